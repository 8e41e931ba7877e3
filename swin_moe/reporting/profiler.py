"""``train.profile``: a trace of a few updates, and a split of their time.

Each instant of an update counts for the first of these activities that is in progress (on a GPU,
data comes after the collectives, since work on the device hides it):

- data: the main thread waits for the next batch;
- compute: ops run, on a CPU in the main thread, on a GPU in any stream;
- all_to_all: rows travel to or from experts while nothing is computed. On gloo, and for the lengths
  of queues, this includes waiting for slower ranks;
- reduce: any other collective, likewise;
- host: none of these, that is Python, and launches for which the device waits.
"""

from __future__ import annotations

import bisect
import gzip
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

from ..common.hardware import GPUS
from ..common.host import silenced
from ..common.text import plain
from ..distributed import World, gather_objects

KINDS = ("compute", "all_to_all", "reduce", "data", "host")
SKIPPED, WARM_UP, UPDATES = 10, 1, 5

Interval = tuple[float, float]
Event = dict[str, Any]


def peak_flops(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> float:
    """Return the vendor's peak of a GPU's matrix products in FLOP/s; 0 if it is not known.

    Args:
        tf32: products in fp32 use TF32.
    """
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    for key, known in GPUS.items():  # a100-80: both parts are in NVIDIA's name
        if all(part in name for part in key.split("-")):
            return known.peak(dtype.itemsize == 2, tf32)
    return 0.0


class Profile:
    """A trace of ``UPDATES`` updates after the first ones; call :meth:`step` after each update.

    Args:
        folder: folder for a trace per rank, for https://ui.perfetto.dev.
        flops: FLOPs of one update on one rank.
        peak: FLOP/s of the device, 0 if it is not known.
    """

    def __init__(
        self, folder: Path, world: World, console: Console, flops: float = 0.0, peak: float = 0.0
    ) -> None:
        self.path = folder / f"rank-{world.rank:05d}.json.gz"
        self.world, self.console = world, console
        self.flops, self.peak = flops, peak
        self._record: dict[str, float] = {}
        self._done = False
        kinds = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=kinds,
            schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=UPDATES, repeat=1),
            on_trace_ready=self._write,
        )
        with silenced():  # it prints a banner, and warnings without a GPU
            self._profiler.start()

    def step(self) -> None:
        """Count an update; every rank must call it."""
        if not self._done:
            with silenced():
                self._profiler.step()

    def take(self) -> dict[str, float]:
        """Return the split once, for the log: ``profile/compute_ms`` etc., means over the ranks."""
        record, self._record = self._record, {}
        return record

    def close(self) -> None:
        """Stop at the end of the training; print a line if the trace is not complete."""
        if not self._done:
            self._done = True
            with silenced():
                self._profiler.stop()
            if self.world.is_main:
                self.console.print(
                    f"train.profile: no trace, it takes {SKIPPED + WARM_UP + UPDATES} updates"
                )

    def _write(self, profiler: profile) -> None:
        if self._done:  # the training has ended before the trace
            return
        self._done = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))
        ranks = gather_objects(split(read(self.path)))
        mean = {kind: statistics.fmean(one[kind] for one in ranks) for kind in KINDS}
        total = sum(mean.values())
        self._record = {f"profile/{kind}_ms": round(ms, 3) for kind, ms in mean.items()}
        self._record["profile/update_ms"] = round(total, 3)
        if self.peak and self.flops:
            self._record["profile/mfu"] = round(100e3 * self.flops / total / self.peak, 2)
        if self.world.is_main:
            self.console.print(_table(ranks, mean))
            if "profile/mfu" in self._record:
                self.console.print(f"model FLOPs utilisation {self._record['profile/mfu']:.1f} %")
            line = f"traces for ui.perfetto.dev: {plain(self.path.parent)}"
            self.console.print(line, markup=False, soft_wrap=True)


def read(path: Path) -> list[Event]:
    """Return the events of a trace that have a duration, with times in µs."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def split(events: list[Event]) -> dict[str, float]:
    """Return the milliseconds of a mean update by kind; they sum to the update's time."""
    updates = [e for e in events if e["name"] == "update" and e.get("cat") == "user_annotation"]
    if not updates:
        return dict.fromkeys(KINDS, 0.0)
    mine = [e for e in events if e["tid"] == updates[0]["tid"]]
    data = _intervals(e for e in mine if e["name"] == "data")
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        nccl = [e for e in kernels if "nccl" in e["name"]]
        rows = [e for e in nccl if "SendRecv" in e["name"] or "AllToAll" in e["name"]]
        claims = {
            "compute": _intervals(e for e in kernels if "nccl" not in e["name"]),
            "all_to_all": _intervals(rows)
            + _intervals(e for e in mine if e["name"] == "all-to-all"),
            "reduce": _intervals(nccl),
            "data": data,
        }
    else:
        rows = [e for e in events if e["name"] == "gloo:all_to_all"]
        others = [e for e in events if e["name"].startswith("gloo:")]
        claims = {
            "data": data,
            "compute": _intervals(e for e in mine if _computes(e)),
            "all_to_all": _in_flight(rows, mine)
            + _intervals(e for e in mine if e["name"] == "all-to-all"),
            "reduce": _in_flight(others, mine)
            + _intervals(e for e in mine if e["name"] == "reduce"),
        }
    left = _union(_intervals(updates))
    found = {}
    for kind, intervals in claims.items():
        rest = _minus(left, _union(intervals))
        found[kind] = (_length(left) - _length(rest)) / len(updates) / 1e3
        left = rest
    found["host"] = _length(left) / len(updates) / 1e3
    return {kind: found[kind] for kind in KINDS}


def _computes(event: Event) -> bool:
    """Return whether an event is an op of torch or ours: autograd and c10d contain waits."""
    space = event["name"].partition("::")[0]
    return event.get("cat") == "cpu_op" and space not in ("c10d", "autograd", event["name"])


def _intervals(events: Iterable[Event]) -> list[Interval]:
    return [(e["ts"], e["ts"] + e["dur"]) for e in events]


def _in_flight(events: list[Event], mine: list[Event]) -> list[Interval]:
    """Return the intervals of collectives, from their submission by the main thread on."""
    begun = sorted(e["ts"] for e in mine if e["name"].startswith("c10d::"))
    intervals = []
    for event in events:
        before = bisect.bisect_right(begun, event["ts"])
        start = begun[before - 1] if before else event["ts"]
        intervals.append((start, event["ts"] + event["dur"]))
    return intervals


def _union(intervals: list[Interval]) -> list[Interval]:
    """Return the union of intervals, sorted and without overlaps."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def _minus(left: list[Interval], taken: list[Interval]) -> list[Interval]:
    """Return ``left`` without ``taken``; both are sorted and without overlaps."""
    result = []
    index = 0
    for start, end in left:
        while index < len(taken) and taken[index][1] <= start:
            index += 1
        at = index
        while at < len(taken) and taken[at][0] < end:
            if taken[at][0] > start:
                result.append((start, taken[at][0]))
            start = max(start, taken[at][1])
            at += 1
        if start < end:
            result.append((start, end))
    return result


def _length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _table(ranks: list[dict[str, float]], mean: dict[str, float]) -> Table:
    table = Table(title=f"an update's time, mean of {UPDATES}, in ms", title_justify="left")
    table.add_column("rank")
    for column in (*KINDS, "together"):
        table.add_column(column.replace("_", "-"), justify="right")
    rows = {str(rank): one for rank, one in enumerate(ranks[:8])} if len(ranks) > 1 else {}
    for name, one in {**rows, "mean": mean}.items():
        total = sum(one.values())
        table.add_row(name, *(f"{one[kind]:.1f}" for kind in KINDS), f"{total:.1f}")
    total = max(sum(mean.values()), 1e-9)
    table.add_row("share", *(f"{100 * mean[kind] / total:.0f} %" for kind in KINDS), "")
    return table
