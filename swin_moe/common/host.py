"""The host's free memory and GPUs, native libraries' standard error, and the compiler's cache."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from .cache_folder import cache_folder

# The share of a device's or a process's memory kept free for fragments, workspaces of libraries and
# the CUDA context, which no trial and no formula shows.
MARGIN = 0.08

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the bytes of memory that this host's processes may still take together."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # the limit of a container or a Slurm job
        limit, taken = (
            int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current")
        )
        free = min(free, limit - taken)
    return free


def count_gpus() -> int:
    """Count the GPUs that a process started here would see, by the driver; needs no torch."""
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
    # CUDA ignores the list from its first invalid entry on.
    valid = itertools.takewhile(lambda v: v not in ("", "-1", "NoDevFiles"), visible.split(","))
    return min(gpus, len(list(valid)))


def use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, against fragments; call before it starts.

    The user's own settings of the allocator win.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same variable
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_graphs(host: str = "") -> None:
    """Let torch.compile keep its results below ``~/.cache``, unless the user has chosen a folder.

    Its own default is in ``/tmp``, which is often emptied.

    Args:
        host: a part of the folder's name, where hosts may share the home directory.
    """
    folder = cache_folder(f"graphs-{host}" if host else "graphs")
    if folder is not None and os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discard stderr, for native code that prints the errors that it raises."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
