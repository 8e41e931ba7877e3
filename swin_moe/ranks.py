"""What the launcher told this process: its rank, its node, its restarts. Needs no torch.

Ranks come from torchrun, DeepSpeed's launcher, or Slurm's ``srun`` or Open MPI's ``mpirun`` with
``MASTER_ADDR`` set; without any of them the program runs as one process.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
from pathlib import Path
from typing import Literal, NoReturn


def environment_rank() -> tuple[int, int, int]:
    """(rank, local rank, world size) that the launcher set; (0, 0, 1) without one."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1))
    if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_NTASKS"])
    if "OMPI_COMM_WORLD_RANK" in env and "MASTER_ADDR" in env:
        mpi = "OMPI_COMM_WORLD_"
        return int(env[f"{mpi}RANK"]), int(env[f"{mpi}LOCAL_RANK"]), int(env[f"{mpi}SIZE"])
    return 0, 0, 1


def local_world_size() -> int:
    """Processes of this node."""
    env = os.environ
    # torchrun, DeepSpeed, Open MPI, Slurm
    names = (
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "SLURM_NTASKS_PER_NODE",
    )
    size = next((env[name] for name in names if env.get(name)), "")
    return int(size) if size else environment_rank()[2]


def auto_expert_parallel_size(num_experts: int) -> int:
    """The largest group that divides the node's processes, and all of them, and the experts."""
    return math.gcd(local_world_size(), environment_rank()[2], num_experts)


def check_world(world_size: int, expert_parallel_size: int) -> None:
    """Raise ``ValueError`` if the expert group does not divide the world."""
    n = expert_parallel_size
    if world_size % n:
        raise ValueError(
            f"parallel.expert_parallel_size={n} does not divide the {world_size} processes: start "
            f"a multiple of {n}, or set parallel.expert_parallel_size=auto"
        )


def node_share(expert_parallel_size: int, hierarchical: bool | Literal["auto"]) -> int:
    """Ranks of an expert group in each of its nodes, if rows are to travel in two steps; else 0.

    Raises:
        ValueError: that is asked for, and the group is not of several equal parts of nodes.
    """
    n, local = expert_parallel_size, local_world_size()
    possible = 1 < local < n and n % local == 0
    if hierarchical is True and not possible:
        raise ValueError(
            f"parallel.hierarchical_all_to_all=true with parallel.expert_parallel_size={n} and "
            f"{local} processes on this node: the group must be of several whole nodes, with "
            "more than one process each"
        )
    return local if possible and hierarchical else 0


def restarts() -> tuple[int, int]:
    """How often the launcher has restarted this group, and how often it would."""
    env = os.environ
    return int(env.get("TORCHELASTIC_RESTART_COUNT", 0)), int(
        env.get("TORCHELASTIC_MAX_RESTARTS", 0)
    )


def started_again() -> bool:
    """Whether a launcher or a scheduler has started this job before, by the same command."""
    return restarts()[0] > 0 or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def refuse_restart() -> None:
    """Ask the launcher, if it is ours, not to start this job again."""
    if file := os.environ.get("SWIN_MOE_FINAL"):
        with contextlib.suppress(OSError):  # the launcher is gone, and its folder
            Path(file).touch()


def being_closed() -> bool:
    """Whether our launcher is ending all processes of this node because one has ended."""
    file = os.environ.get("SWIN_MOE_FINAL")
    return file is not None and Path(file).with_name("closing").exists()


def is_first_of_node() -> bool:
    """Whether this process speaks for those of its node; if nobody knows, it does."""
    try:
        return environment_rank()[1] == 0
    except (ValueError, KeyError):
        return True


def leave(code: int) -> NoReturn:
    """End this process at once, everything that was printed or logged included.

    After a failure a process must not wait for the others in its shutdown; after success, the
    threads of the process groups sometimes abort the interpreter while it takes itself apart.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not change the exit code
            stream.flush()
    os._exit(code)


def hostname() -> str:
    return socket.gethostname()
