"""The addresses of a run's stores, and the effect of foreign bytes sent to them."""

import pickle
import socket

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from swin_moe import distributed
from swin_moe.distributed import stores
from swin_moe.launch import rendezvous


def test_a_store_listens_at_one_address():
    with stores.listen_at("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    store = stores.tcp_store("localhost", 0, is_master=True, wait_for_workers=False)
    other = dist.TCPStore("localhost", store.port, wait_for_workers=False)
    other.set("key", "value")
    assert store.get("key") == b"value"
    # A store that listens on all interfaces would have this address, too.
    with socket.create_server(("127.0.0.2", store.port)):
        pass


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("own-name", "127.0.1.1"),  # Debian's, which the other nodes do not reach
        ("outside", "192.0.2.1"),  # of no interface of this machine
        ("nobody", None),
    ],
)
def test_where_others_would_not_come_in_a_store_listens_everywhere(monkeypatch, host, address):
    def resolve(name, port, **_):
        if address is None:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    monkeypatch.setattr(stores.socket, "getaddrinfo", resolve)
    assert stores.listen_at(host, 0) is None


def test_processes_that_meet_on_loopback_stay_there(monkeypatch):
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    stores.stay_on_loopback("node-0")
    assert not any(name in stores.os.environ for name in names)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    stores.stay_on_loopback("127.0.0.1")
    assert [stores.os.environ[name] for name in names] == ["lo", "mine"]


def test_processes_of_one_machine_meet_in_a_private_file(tmp_path, monkeypatch):
    monkeypatch.setenv(stores.FILE, "")
    handler = rendezvous.OneMachine(tmp_path)
    infos = [handler.next_rendezvous() for _ in range(2)]
    assert stores.os.environ[stores.FILE] == str(tmp_path / "store-2")
    assert [(info.rank, info.world_size) for info in infos] == [(0, 1)] * 2
    assert handler.get_run_id() != rendezvous.OneMachine(tmp_path).get_run_id()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    meeting = distributed.connect(timeout=1.0)
    assert meeting.store.check(["host/0"])
    assert (tmp_path / "store-2").exists()


class _Touch:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_the_rendezvous_runs_nothing_that_a_stranger_has_written(tmp_path):
    evil = pickle.dumps(_Touch(str(tmp_path / "ran")))
    state = dynamic_rendezvous._RendezvousState()
    node = dynamic_rendezvous._NodeDesc("node-0", 1, 0)
    state.participants[node], state.wait_list = 0, {node}
    state.last_heartbeats[node] = dynamic_rendezvous.datetime.now(dynamic_rendezvous.timezone.utc)
    again = rendezvous._Pickle.loads(pickle.dumps(state))
    assert (again.participants, again.wait_list) == (state.participants, state.wait_list)
    assert again.last_heartbeats == state.last_heartbeats
    with pytest.raises(pickle.UnpicklingError, match="no part of a rendezvous"):
        rendezvous._Pickle.loads(evil)
    assert not (tmp_path / "ran").exists()
