"""Shared code of the benchmarks: interleaved timing under equal conditions, tables and JSON.

A shared machine is noisy, so contenders run in turn within one process, and a figure is a median.
New memory pages and denormals cost CPU programs more than most kernels do: every contender gets the
launchers' tuned allocator and flushed denormals (`tuned_process`). On a GPU a figure is the time
between two CUDA events.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.distributed import World

# The launchers' setting for glibc, see launch/common.sh.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
# Cycles that the GPU waits, about 5 ms, while the launches of a call queue up.
QUEUE_CYCLES = 10_000_000
_chosen_device = ""  # empty: a GPU if there is one


def tuned_process() -> None:
    """Set PyTorch's switches as a run does; restart with the tuned allocator if it has another."""
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False  # as products, and as without precision.tf32
    if "malloc" not in os.environ.get("LD_PRELOAD", "") and any(
        os.environ.get(key) != value for key, value in ALLOCATOR.items()
    ):
        module = sys.modules["__main__"].__spec__
        program = ["-m", module.name, *sys.argv[1:]] if module else sys.argv
        os.execve(sys.executable, [sys.executable, *program], {**os.environ, **ALLOCATOR})


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark, ``--json`` and ``--quick``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few cells and few rounds")
    return parser


def choose_device(name: str) -> None:
    """Measure on ``cpu`` or ``cuda`` from now on; empty = on a GPU if there is one."""
    global _chosen_device
    _chosen_device = name


def device() -> str:
    """Return the device of the measurements, ``cpu`` or ``cuda``."""
    return _chosen_device or ("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if it is measured."""
    if device() == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Return the time of a call: on a CPU the wall time, on a GPU the time between two events.

    The GPU first waits, so that short kernels do not wait for their launches. The time of a call
    that reads from the GPU includes that wait.
    """
    if device() == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def interleaved(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    *,
    timer: Callable[[Callable[[], object]], float] = seconds,
    every: dict[str, int] | None = None,
) -> dict[str, float]:
    """Return the median milliseconds of each contender, which all run once a round.

    Args:
        contenders: by name.
        rounds: that are timed.
        warmup: rounds before them.
        timer: returns the seconds of a call.
        every: contenders that run only in each n-th round, with n.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warmup, rounds):
        for name, run in contenders.items():
            if turn >= 0 and turn % (every or {}).get(name, 1):
                continue
            taken = timer(run)
            if turn >= 0:
                times[name].append(taken)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def cell(
    name: str, dtype: torch.dtype, mode: str, times: dict[str, float], **more: object
) -> dict[str, object]:
    """Return the cell of a time in milliseconds; ``speedup`` is the best peer's time over ours."""
    digits = 3 if times["ours"] >= 1 else 5
    peers = {peer: round(taken, digits) for peer, taken in times.items() if peer != "ours"}
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "unit": "ms",
        "ours": round(times["ours"], digits),
        "peers": peers,
        "speedup": round(min(peers.values()) / times["ours"], 2) if peers else None,
        **more,
    }


def figure(
    name: str, unit: str, ours: float | None, *, mode: str = "", dtype: str = "", **more: object
) -> dict[str, object]:
    """Return the cell of a figure without peers, such as bytes or percent."""
    cell = {"name": name, "dtype": dtype, "mode": mode, "unit": unit, "ours": ours}
    return {**cell, "peers": {}, "speedup": None, **more}


def columns(*more: str) -> list[str]:
    """Return the headings of the rows that :func:`row` makes."""
    return ["cell", "dtype", "mode", "ours", "best peer", "which", "speedup", *more]


def row(cell: dict[str, object], *more: str) -> list[str]:
    """Return a cell as strings: our figure, the best peer's, the speedup, and further keys."""
    peers, ours = cell["peers"], cell["ours"]
    assert isinstance(peers, dict)
    named = [str(cell[key]) for key in ("name", "dtype", "mode")]
    if not isinstance(ours, float):
        return [*named, "failed", "", "", "", *("" for _ in more)]
    digits = 2 if ours >= 1 else 4
    figures = [f"{ours:.{digits}f}", "", "", ""]
    if peers:
        pick = min if cell["unit"] == "ms" else max
        best = pick(peers, key=peers.__getitem__)
        figures[1:] = [f"{peers[best]:.{digits}f}", best, f"{cell['speedup']:.2f}x"]
    return named + figures + [str(cell.get(key, "")) for key in more]


def summary(cells: list[dict[str, object]]) -> None:
    """Print the geometric mean and the lowest speedup of each dtype and mode."""
    kinds = dict.fromkeys((cell["dtype"], cell["mode"]) for cell in cells)
    for kind in kinds:
        speedups = [
            float(str(cell["speedup"]))
            for cell in cells
            if (cell["dtype"], cell["mode"]) == kind and cell["speedup"] is not None
        ]
        if not speedups:
            continue
        mean = statistics.geometric_mean(speedups)
        print(f"{kind[0]} {kind[1]}: {mean:.2f}x the best peer (lowest {min(speedups):.2f}x)")


@functools.cache
def driver() -> str:
    """Return the version of the GPU's driver; empty if it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def machine() -> dict[str, object]:
    """Return the device of the measurements with its properties."""
    if device() == "cuda":
        found = torch.cuda.get_device_properties()
        return {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "driver": driver(),
            "memory_gib": round(found.total_memory / 2**30, 1),
        }
    model = platform.processor() or "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
        flags = next(line.split(": ", 1)[1].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration, IndexError):
        flags = []
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return {"device": model, "instructions": extensions, "threads": torch.get_num_threads()}


def report(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


def release_memory() -> None:
    """Return freed memory to the system; with :data:`ALLOCATOR` glibc keeps it otherwise."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def torchrun(count: int, module: str, *words: str) -> list[str]:
    """Return the command that runs a module on ``count`` processes."""
    if count == 1:
        return [sys.executable, "-m", module, *words]
    front = ["-m", "swin_moe.launch.torchrun", "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *front, "-m", module, *words]


def on_processes(module: str, count: int, *more: str) -> list[dict[str, object]]:
    """Run the program ``module`` under torchrun, with one thread a process; return its cells.

    Args:
        module: gets this program's arguments, ``more`` and ``--worker PATH``; :func:`hand_over`
            writes its cells to PATH.
        count: processes.
        more: arguments.

    Raises:
        SystemExit: a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.json"
        command = torchrun(count, module, *sys.argv[1:], *more, "--worker", str(path))
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        cells = json.loads(path.read_text())
    assert isinstance(cells, list)
    return cells


def hand_over(path: Path, cells: list[dict[str, object]], world: World) -> NoReturn:
    """End one of several processes; rank 0 writes its cells for :func:`on_processes`."""
    if world.is_main:
        path.write_text(json.dumps(cells))
    distributed.barrier()
    distributed.shutdown()
    ranks.leave(0)


def write_json(path: Path | None, cells: list[dict[str, object]], **more: object) -> None:
    """Write the cells with versions and machine, if a path was given."""
    if path is None:
        return
    content = {
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
        **more,
        "cells": cells,
    }
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)  # a kill leaves the older file
