"""This host and this process: free memory, and what native libraries print."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

# Of a device's or a process's memory, for what no trial and no formula shows: fragments, workspaces
# of libraries, the context.
MARGIN = 0.08

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of the host's memory that its processes may still take, together."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # the limit of a container or a Slurm job
        limit, taken = (
            int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current")
        )
        free = min(free, limit - taken)
    return free


def count_gpus() -> int:
    """GPUs that processes started here would see, as the driver counts them; needs no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    gpus = sum(line.startswith("GPU") for line in listed.splitlines())
    if visible is None:
        return gpus
    # CUDA stops at the first entry that is none.
    valid = itertools.takewhile(lambda v: v not in ("", "-1", "NoDevFiles"), visible.split(","))
    return min(gpus, len(list(valid)))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without the pages that native code prints to stderr about what it raises as well."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
