"""Keeps a rank on the CPUs of the NUMA node to which its GPU is attached.

torchrun's ``--numa-binding`` starts each process through numactl; it would bypass the fork server,
and serve no other launcher.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from ..common.ranks import local_world_size

SYSFS = Path("/sys")


def bind_to_gpu(device: torch.device, sysfs: Path = SYSFS) -> str:
    """Bind this process to its GPU's NUMA node, and fit its threads to the rank's share of it.

    Nothing changes on a machine with one node, or if this process may not run on all CPUs: then the
    user, a scheduler or a container has bound it.

    Returns:
        a clause on the binding for the log, "" if there is none.
    """
    cpus = _cpus_by_node(sysfs)
    if device.type != "cuda" or len(cpus) < 2:
        return ""
    if os.sched_getaffinity(0) != set().union(*cpus.values()):
        return ""
    gpus = [_node_of(_pci_address(index), sysfs) for index in range(torch.cuda.device_count())]
    node = gpus[device.index]
    if node not in cpus:  # -1: the firmware does not say
        return ""
    # Ranks take the GPUs in turn, see `init`.
    sharers = sum(gpus[rank % len(gpus)] == node for rank in range(local_world_size()))
    for thread in Path("/proc/self/task").iterdir():  # those that libraries have started, too
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread.name), cpus[node])
    share = max(len(cpus[node]) // max(sharers, 1), 1)
    torch.set_num_threads(min(torch.get_num_threads(), share))
    return f"bound to the {len(cpus[node])} CPUs of NUMA node {node}, next to its GPU"


def _pci_address(index: int) -> str:
    gpu: Any = torch.cuda.get_device_properties(index)  # torch's stub lacks two of these
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def _node_of(address: str, sysfs: Path) -> int:
    """Return the NUMA node of a PCI device, -1 if it is not known."""
    try:
        return int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def _cpus_by_node(sysfs: Path) -> dict[int, set[int]]:
    """Return the CPUs of each NUMA node that has some."""
    found = {}
    for folder in (sysfs / "devices/system/node").glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if cpus := _parse((folder / "cpulist").read_text()):
                found[int(folder.name.removeprefix("node"))] = cpus
    return found


def _parse(cpulist: str) -> set[int]:
    """Return the numbers of a list such as ``0-3,8``."""
    cpus: set[int] = set()
    for part in filter(None, cpulist.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
