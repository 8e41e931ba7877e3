"""This process's rank, node and restarts, as its launcher set them. Needs no torch.

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

# Each launcher's variables: rank, local rank, world size; and another that must be set.
_LAUNCHERS = (
    (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ""),
    (("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"), "MASTER_ADDR"),
    (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        "MASTER_ADDR",
    ),
)
# The number of processes on this node, as torchrun, DeepSpeed, Open MPI and Slurm set it.
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_NTASKS_PER_NODE",
)
_MOST = 1_000_000  # processes: more are a typing error
_NO_STEP = 0xFFFF_FFF0  # from here on, Slurm's step numbers are batch scripts and shells


def environment_rank() -> tuple[int, int, int]:
    """Return (rank, local rank, world size) from the launcher; (0, 0, 1) without one.

    Raises:
        ValueError: a variable is missing, is no number, or contradicts another.
    """
    names = _launcher()
    local_world_size()  # for its errors
    if not names:
        return 0, 0, 1
    size = _number(names[2], 1, _MOST, 1)
    rank = _number(names[0], 0, None, 0)
    if rank >= size:
        given = f"{names[2]}={size}" if os.environ.get(names[2]) else f"{names[2]} is not set"
        raise ValueError(f"{names[0]}={rank}, but {given}: ranks go from 0 to {names[2]} - 1")
    return rank, _number(names[1], 0, None, 0), size


def _launcher() -> tuple[str, str, str] | None:
    """Return the names of the launcher's variables for rank, local rank and world size."""
    env = os.environ
    for names, also in _LAUNCHERS:
        if names[0] in env and (not also or also in env):
            return names
    return None


def _number(name: str, least: int, most: int | None, default: int) -> int:
    """Return the whole number in a variable; an empty one counts as not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    if not text.isdecimal() or not least <= int(text[:20]) <= (most or sys.maxsize):
        raise ValueError(f"{name}={text[:40]} is not a whole number {bounds}")
    return int(text)


def world_variables() -> str:
    """Return the variables with the world size and this process's rank, for messages."""
    names = _launcher()
    if not names:
        return "no launcher's variables"
    return " and ".join(f"{name}={os.environ.get(name, '')}" for name in (names[2], names[0]))


def check_launcher() -> None:
    """Raise ``ValueError`` if there are several processes, but this one's rank is not set."""
    if _launcher():
        return
    for names, also in _LAUNCHERS:
        several = also and names[0] in os.environ and _number(names[2], 1, _MOST, 1) > 1
        if several and (names[0] != "SLURM_PROCID" or _in_step()):
            raise ValueError(
                f"{names[2]}={os.environ[names[2]]}, but {also} is not set, and each process would "
                f"train alone: export {also}=HOST of rank 0, or start one process"
            )
    size = os.environ.get("WORLD_SIZE", "")
    if size not in ("", "1"):
        raise ValueError(
            f"WORLD_SIZE={size}, but RANK is not set: start all processes by a launcher, or unset "
            "WORLD_SIZE"
        )


def _in_step() -> bool:
    """Return whether srun has started this process."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _NO_STEP


def without_srun() -> bool:
    """Return whether Slurm set the rank of this process, but no srun started it.

    This holds in a batch script and in the shell of salloc: the number of tasks is that of the job,
    and this process is the only one.
    """
    names = _launcher()
    return names is not None and names[0] == "SLURM_PROCID" and not _in_step()


def become_alone() -> None:
    """Set the variables of a single process."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")


def check_alone(command: str) -> str:
    """Make sure that a command runs as one process; return a line for the user, or nothing.

    Raises:
        ValueError: a launcher has started several processes.
    """
    rank, _, size = environment_rank()
    if size == 1:
        return ""
    variables = world_variables()
    if rank == 0 and without_srun():
        become_alone()
        return f"{command} runs as one process, although {variables}: no srun started it"
    raise ValueError(
        f"{command} runs as one process, but {variables}: start it without a launcher (under Slurm "
        "by srun --ntasks 1)"
    )


def local_world_size() -> int:
    """Return the number of processes of this node."""
    world = _launcher()
    size = _number(world[2] if world else "WORLD_SIZE", 1, _MOST, 1)
    size = size if world else 1
    name = next((name for name in _LOCAL_SIZES if os.environ.get(name)), "")
    # A job may have more tasks per node than one step has tasks.
    return min(_number(name, 1, _MOST, 1), size) if name else size


def auto_expert_parallel_size(num_experts: int) -> int:
    """Return the greatest common divisor of the node's processes, all processes and the experts."""
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
    """Return how many ranks of an expert group are on each node for a hierarchical all-to-all.

    Returns:
        0 if rows are exchanged in one step.

    Raises:
        ValueError: ``hierarchical`` is true, but the group is not of several whole nodes.
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
    """Return how often the launcher has restarted this group, and how often it may."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    done, allowed = (_number(name, 0, None, 0) for name in names)
    return done, allowed


def started_again() -> bool:
    """Return whether a launcher or a scheduler has started this job before."""
    return restarts()[0] > 0 or _number("SLURM_RESTART_COUNT", 0, None, 0) > 0


def refuse_restart() -> None:
    """Ask our launcher not to start this job again."""
    if file := os.environ.get("SWIN_MOE_FINAL"):
        with contextlib.suppress(OSError):  # the launcher is gone, and its folder
            Path(file).touch()


def being_closed() -> bool:
    """Return whether our launcher is ending all processes of this node because one has ended."""
    file = os.environ.get("SWIN_MOE_FINAL")
    return file is not None and Path(file).with_name("closing").exists()


def is_first_of_node() -> bool:
    """Return whether this is the node's first process; also true if its rank is unknown."""
    try:
        return environment_rank()[1] == 0
    except (ValueError, KeyError):
        return True


def leave(code: int) -> NoReturn:
    """Flush the logs and streams, and end this process at once.

    After a failure, a process must not wait for the others in its shutdown. After success, the
    threads of the process groups sometimes abort the interpreter while it shuts down.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not change the exit code
            stream.flush()
    os._exit(code)


def hostname() -> str:
    return socket.gethostname()
