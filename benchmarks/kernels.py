"""Shared code of the compiled ops' benchmarks: options, contests, and cells that may fail.

A peer that does not run is left out and named. A cell in which our op does not run is a failed
cell: the others are still measured, and the program ends with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import harness
from benchmarks.first_contact.record import NOT_RUN
from swin_moe import ops

Runs = Mapping[str, Callable[[], object]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS_OF_AN_IMAGE = 256  # in stage 3 of a model for 256 pixels, where most of the blocks are


class Job(NamedTuple):
    """A cell to measure: its name, and the function that measures it."""

    name: str
    dtype: torch.dtype
    mode: str
    measure: Callable[[], dict[str, object]]
    unit: str = "ms"


class Times(NamedTuple):
    """Median milliseconds of the contenders that ran, and why others did not."""

    of: dict[str, float]
    left_out: dict[str, str]


def arguments(
    description: str, peers: Sequence[str], rounds: int, dtypes: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser with an op's options: device, batch, peers, rounds, and perhaps dtypes."""
    split = partial(str.split, sep=",")
    parser = harness.arguments(description)
    parser.add_argument("--device", default="", choices=["", "cpu", "cuda"], help="default: a GPU")
    parser.add_argument("--batch", type=int, default=0, help="images; default: the usual shapes")
    parser.add_argument("--peers", type=split, default=list(peers), help=",".join(peers))
    parser.add_argument("--rounds", type=int, default=rounds)
    if dtypes:
        parser.add_argument("--dtypes", type=split, default=list(dtypes), help=",".join(DTYPES))
    return parser


def start(options: argparse.Namespace, tuned: bool = True) -> None:
    """Choose the device, tune the process, and let kernels run without a trial."""
    harness.choose_device(options.device)
    if tuned:
        harness.tuned_process()
    ops.trust_kernels()


def need(*packages: str) -> None:
    """End the program with ``NOT_RUN`` if one of the packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; carry the wheels (gpu_wheels.sh)", flush=True)
        raise SystemExit(NOT_RUN)


def chosen(peers: Runs, wanted: Sequence[str], ours: Callable[[], object]) -> Runs:
    """Return the wanted peers, then ours."""
    found = {name: run for name, run in peers.items() if name in wanted}
    return {**found, "ours": ours}


def contest(runs: Runs, rounds: int, warmup: int = 2) -> Times:
    """Time the contenders that run; the others are left out.

    Raises:
        Exception: ours does not run.
    """
    left_out = {}
    # Ours runs first, because a peer may break the GPU's context.
    for name, run in sorted(runs.items(), key=lambda item: item[0] != "ours"):
        try:
            run()
            harness.synchronize()
        except Exception as problem:
            if name == "ours":
                raise
            left_out[name] = first_line(problem)
            print(f"  {name} does not run here: {left_out[name]}", flush=True)
            release()
    able = {name: run for name, run in runs.items() if name not in left_out}
    return Times(harness.interleaved(able, rounds, warmup), left_out)


def first_line(problem: Exception) -> str:
    """Return an error in one short line, for a table."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0][:150]}" if lines else type(problem).__name__


def release() -> None:
    """Release the memory of a contender that failed."""
    gc.collect()
    if harness.device() == "cuda":
        with contextlib.suppress(RuntimeError):  # after an illegal access nothing works any more
            torch.cuda.empty_cache()


def measured(jobs: Iterable[Job], options: argparse.Namespace, **facts: object) -> Iterator[dict]:
    """Yield each job's cell, and write the JSON after each, so that a kill leaves some.

    Args:
        facts: go into the JSON, next to the cells.
    """
    cells: list[dict[str, object]] = []
    for job in jobs:
        try:
            cell = job.measure()
        except Exception as problem:
            dtype, error = str(job.dtype).removeprefix("torch."), first_line(problem)
            cell = harness.figure(job.name, job.unit, None, mode=job.mode, dtype=dtype, error=error)
            release()
        cells.append(cell)
        print("  ".join(harness.row(cell)), cell.get("error", ""), flush=True)
        harness.write_json(options.json, cells, **facts)
        yield cell


def run(
    title: str, jobs: Iterable[Job], options: argparse.Namespace, *more: str, **facts: object
) -> None:
    """Measure all jobs, print the table with further keys ``more``, write the JSON.

    Raises:
        SystemExit: with code 1 if a cell failed.
    """
    cells = list(measured(jobs, options, **facts))
    harness.report(title, harness.columns(*more), [harness.row(cell, *more) for cell in cells])
    harness.summary(cells)
    failed = [str(cell["name"]) for cell in cells if "error" in cell]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}")


class Ceilings(NamedTuple):
    """The highest rates of the device, measured with torch."""

    flops: float  # FLOP/s of a product of square matrices
    bytes: float  # bytes/s of a copy, read and written

    def as_json(self) -> dict[str, float]:
        return {
            "tflops": round(self.flops / 1e12, 2),
            "gigabytes_per_second": round(self.bytes / 1e9, 1),
        }


def ceilings(dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Measure the rates of a large matrix product into a kept buffer and of a large copy."""
    device = harness.device()
    side, floats = (8192, 256 << 20) if device == "cuda" else (2048, 64 << 20)
    if quick and device == "cpu":
        side, floats = 512, 4 << 20
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(floats, device=device)
    target = torch.zeros_like(source)
    times = harness.interleaved(
        {
            "product": lambda: torch.mm(a, b, out=product),
            "copy": lambda: target.copy_(source),
        },
        rounds=9,
    )
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(2 * side**3 / times["product"] * 1e3, copied / times["copy"] * 1e3)
