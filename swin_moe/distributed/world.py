"""Starts torch.distributed; makes groups, reduces over them, and seeds the generators."""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from ..common.ranks import (
    check_launcher,
    check_world,
    environment_rank,
    hostname,
    node_share,
    restarts,
    world_variables,
)
from ..common.text import reason
from .meeting import Meeting, open_store
from .numa import bind_to_gpu
from .stores import FILE, stay_on_loopback

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns about a missing GPU

PATIENCE = 600.0  # seconds to wait for other processes


@dataclass(frozen=True)
class Group:
    """One process group as this rank sees it.

    Attributes:
        handle: None for a group of this rank alone.
        rank: of this process in the group.
        size: number of ranks.
        intra: the group's ranks of this node, if the group spans nodes and splits its messages.
        inter: the group's ranks with the same place in their nodes, on all its nodes; or None.
    """

    handle: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    intra: Group | None = None
    inter: Group | None = None


@dataclass(frozen=True)
class World:
    """This process, its device and its groups.

    Ranks ``[i·n, (i+1)·n)`` form an expert group of size n, which holds each expert once. With n at
    most a node's processes, expert parallelism stays inside the node. Ranks with equal ``rank % n``
    form an expert-data group, whose members replicate the same experts.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    expert: Group
    expert_data: Group
    meeting: Meeting | None = None
    binding: str = ""  # a clause on the CPUs to which this process was bound

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def connect(timeout: float = PATIENCE, group_timeout: float = 0.0) -> Meeting:
    """Connect to the store of all ranks; no process group is made yet.

    Args:
        timeout: seconds to wait for rank 0, and in each exchange for the others.
        group_timeout: seconds that an operation of the process group may take; 0 = ``timeout``.

    Raises:
        ConnectionError: the store cannot be reached.
        ValueError: the environment does not give its address.
    """
    env = os.environ
    check_launcher()
    rank, _, size = environment_rank()
    if size == 1:
        return Meeting(None, rank, size, "", timeout, group_timeout)
    address, port = env.get("MASTER_ADDR", ""), env.setdefault("MASTER_PORT", "29500")
    if not address:
        raise ValueError(
            f"rank {rank} of {size}: MASTER_ADDR does not say where rank 0 is "
            f"({world_variables()} in the environment)"
        )
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"MASTER_PORT={port} is not a number from 1 to 65535")
    stay_on_loopback(address)
    # The launcher's store outlives a restart: without a prefix, the new group would find the
    # addresses of the dead one.
    life = f"restart-{restarts()[0]}"
    store: dist.Store
    if file := env.get(FILE):  # set by the launcher: all processes are on this machine
        store, place = dist.FileStore(file, -1), "the store of this machine"
    else:
        serve = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = open_store(address, int(port), rank, size, timeout, serve)
        place = f"{address}:{port}"
    return Meeting(dist.PrefixStore(life, store), rank, size, place, timeout, group_timeout)


def init(
    expert_parallel_size: int = 1,
    hierarchical: bool | Literal["auto"] = "auto",
    meeting: Meeting | None = None,
) -> World:
    """Join the process group and make the expert groups.

    Args:
        expert_parallel_size: ranks of an expert group.
        hierarchical: see ``parallel.hierarchical_all_to_all``.
        meeting: from :func:`connect`, if that has been called; its time-out is also the group's.

    Raises:
        ValueError: the expert group does not divide the world, or not into whole nodes.
        ConnectionError: the processes do not reach one another.
    """
    rank, local_rank, size = environment_rank()
    check_world(size, expert_parallel_size)
    per_node = node_share(expert_parallel_size, hierarchical)
    # DeepSpeed reads these three.
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", size)):
        os.environ[name] = str(value)
    device, binding = torch.device("cpu"), ""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        binding = bind_to_gpu(device)  # before NCCL starts its threads
    if not dist.is_initialized():
        meeting = meeting or connect()
        _join(meeting, device)
    expert = expert_data = Group()
    starts = range(0, size, expert_parallel_size)
    if size > 1:
        n = expert_parallel_size
        expert = _own_group((range(start, start + n) for start in starts), rank)
        expert_data = _own_group((range(offset, size, n) for offset in range(n)), rank)
    if per_node:
        nodes = (range(start, start + per_node) for start in range(0, size, per_node))
        same_places = (
            range(start + offset, start + expert.size, per_node)
            for start in starts
            for offset in range(per_node)
        )
        intra, inter = _own_group(nodes, rank), _own_group(same_places, rank)
        expert = replace(expert, intra=intra, inter=inter)
    return World(rank, local_rank, size, device, expert, expert_data, meeting, binding)


def backend() -> str:
    """Return torch.distributed's backend for this machine's devices."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _join(meeting: Meeting, device: torch.device) -> None:
    timeout = datetime.timedelta(seconds=meeting.group_timeout)
    store = meeting.store or dist.HashStore()
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            backend(), store=store, rank=meeting.rank, world_size=meeting.size, timeout=timeout,
            device_id=device if device.type == "cuda" else None,  # NCCL need not guess it
        )  # fmt: skip
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {meeting.rank} on {hostname()} reaches {meeting.place}, but not the other "
            f"processes ({reason(error)}): GLOO_SOCKET_IFNAME names the network interface to use"
        ) from error


def _own_group(groups: Iterable[range], rank: int) -> Group:
    """Make all groups and return the one with ``rank``; every rank must make every group."""
    own = Group()
    for ranks in groups:
        handle = dist.new_group(list(ranks))
        if rank in ranks:
            assert isinstance(handle, dist.ProcessGroup)
            own = Group(handle, ranks.index(rank), len(ranks))
    return own


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def all_reduce_(tensor: torch.Tensor, op: str = "sum", group: Group | None = None) -> torch.Tensor:
    """Reduce in place over ``group`` (default: all ranks); ``op`` is sum, max or min."""
    alone = group.size == 1 if group else not dist.is_initialized() or dist.get_world_size() == 1
    if not alone:
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        with torch.profiler.record_function("reduce"):
            dist.all_reduce(tensor, op=operation[op], group=group.handle if group else None)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank; for small objects, which travel as pickles."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's ``value`` by rank; for small objects, which travel as pickles."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and torch; each rank differently, for dropout and gate noise."""
    value = (seed * 1_000_003 + rank) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def make_deterministic() -> None:
    """Let PyTorch use deterministic algorithms only, and raise where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product
    torch.use_deterministic_algorithms(True)
    # Otherwise every new tensor would be filled with NaN, which only finds faulty code.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of this rank's torch generators; data order and augmentation need none."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
