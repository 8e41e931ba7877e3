"""Ranks are bound to the NUMA nodes of their GPUs, on a fake machine."""

import os
from types import SimpleNamespace

import pytest
import torch

from swin_moe.distributed import numa

NODES = {0: "0-3,8-11", 1: "4-7,12-15", 2: ""}  # the third has memory only
ALL = set(range(16))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes a machine of GPUs and binds a rank; it returns what was set."""

    def bind(gpu, nodes=NODES, gpu_nodes=(0, 0, 1, 1), allowed=ALL, ranks=4, threads=16):
        for node, cpus in nodes.items():
            folder = tmp_path / f"devices/system/node/node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(cpus + "\n")
        for number, node in enumerate(gpu_nodes):
            folder = tmp_path / f"bus/pci/devices/0001:{0x1A + number:02x}:00.0"
            folder.mkdir(parents=True)
            (folder / "numa_node").write_text(f"{node}\n")
        found = {"threads": threads, "bound": {}}
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpu_nodes))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(
            pci_domain_id=1, pci_bus_id=0x1A + index, pci_device_id=0))  # fmt: skip
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
        monkeypatch.setattr(os, "sched_setaffinity", found["bound"].__setitem__)
        monkeypatch.setattr(numa, "local_world_size", lambda: ranks)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: found.update(threads=n))
        device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
        found["line"] = numa.bind_to_gpu(device, tmp_path)
        return found

    return bind


@pytest.mark.parametrize(
    ("gpu", "node", "cpus"),
    [(1, 0, {*range(4), *range(8, 12)}), (2, 1, {*range(4, 8), *range(12, 16)})],
)
def test_a_rank_is_bound_to_the_node_of_its_gpu(machine, gpu, node, cpus):
    found = machine(gpu)
    assert found["line"] == f"bound to the 8 CPUs of NUMA node {node}, next to its GPU"
    assert os.getpid() in found["bound"]
    assert all(bound == cpus for bound in found["bound"].values())
    assert found["threads"] == 4  # two ranks share the node


def test_threads_are_never_added(machine):
    assert machine(0, threads=1)["threads"] == 1


def test_ranks_that_share_a_gpu_share_its_cores(machine):
    assert machine(2, ranks=8)["threads"] == 2


def test_a_node_with_fewer_cores_than_ranks_gives_one_thread(machine):
    found = machine(0, nodes={0: "0", 1: "1-15"}, gpu_nodes=(0, 0))
    assert found["threads"] == 1
    assert all(bound == {0} for bound in found["bound"].values())


@pytest.mark.parametrize(
    "case",
    [
        {"gpu": None},
        {"gpu": 0, "nodes": {0: "0-15"}},
        {"gpu": 0, "allowed": set(range(8))},  # taskset, Slurm or a container
        {"gpu": 0, "gpu_nodes": (-1, -1)},  # a virtual machine
        {"gpu": 0, "nodes": {}},
    ],
)
def test_nothing_is_bound_without_need_or_knowledge(machine, case):
    found = machine(**case)
    assert (found["line"], found["bound"], found["threads"]) == ("", {}, 16)
