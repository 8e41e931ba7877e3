"""The order of exchanges on CUDA streams, and how long their tensors live, with stand-ins."""

import weakref

import pytest
import torch

from swin_moe.distributed import Group
from swin_moe.moe import all_to_all
from swin_moe.moe.all_to_all import AllToAll
from tests.streams import OnDevice, Streams

PAIR = Group(None, 0, 2)
NODES = Group(None, 0, 2, intra=Group(), inter=PAIR)


@pytest.fixture
def streams(monkeypatch):
    all_to_all._side_stream.cache_clear()
    yield Streams(monkeypatch)
    all_to_all._side_stream.cache_clear()


@pytest.fixture
def exchanges(monkeypatch, streams):
    """Replace the collective by one that records on which stream it runs."""
    found = []

    class Work:
        def wait(self):
            found.append("waited")

    def exchange(out, x, by, to, group, async_op):
        assert x.is_contiguous()
        streams.run(f"exchange {len(found)}")
        found.append((weakref.ref(x), weakref.ref(out)))
        return Work() if async_op else None

    monkeypatch.setattr(all_to_all.dist, "all_to_all_single", exchange)
    return found


def rows():
    return torch.zeros(4, 3).as_subclass(OnDevice)


def journey(group):
    return AllToAll(torch.full((2, 2), 2), group)


def test_a_wait_is_for_its_own_exchange_only(streams, exchanges):
    streams.run("rows")
    first = journey(NODES).start(rows(), rows())
    streams.run("experts")
    second = journey(NODES).start(rows(), rows())
    assert streams.main.done == ["rows", "experts"]
    first.wait()
    assert streams.main.done == ["rows", "experts", "exchange 0", "exchange 1"]
    second.wait()
    assert streams.main.done[-2:] == ["exchange 2", "exchange 3"]


def test_an_exchange_begins_after_what_made_its_rows(streams, exchanges):
    streams.run("rows")
    journey(NODES).start(rows(), rows(), back=True)
    assert all_to_all._side_stream(torch.device("cpu")).done == ["rows", "exchange 0", "exchange 1"]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("group", [NODES, PAIR], ids=["hierarchical", "flat"])
def test_tensors_live_until_the_wait(exchanges, group, back):
    x, out = rows().t().contiguous().t(), rows()  # x is copied
    assert not x.is_contiguous()
    pending = journey(group).start(x, out, back)
    assert pending.held[1] is out
    kept = [weakref.ref(tensor) for tensor in pending.held]
    if group is PAIR:
        assert kept == list(exchanges[0])
    del x, out
    assert all(tensor() is not None for tensor in kept)
    pending.wait()
    assert [tensor() for tensor in kept] == [None, None]
