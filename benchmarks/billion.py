"""A billion parameters on two CPU cores: peak memory, seconds per step and loss of a training.

Trains configs/scale/swin_moe_1b_laptop.yaml by the command line in several ways, one after the
other. It samples the proportional set size of all processes, which counts shared memory once. A
training is stopped if the host's free memory falls below 1 GB.

    python -m benchmarks.billion [--ways fp32 bf16-moments nvme] [--steps 30] [--processes 1]
        [--json PATH] [--quick] [key=value ...]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from swin_moe.config import load_config

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/scale/swin_moe_1b_laptop.yaml"
GB = 1e9
FLOOR = 1 * GB  # of free memory
WAYS = {
    "fp32": ["optimizer.moments=fp32"],
    "bf16-moments": ["optimizer.moments=bf16"],
    "bf16-all": ["precision.dtype=bf16", "optimizer.moments=bf16"],
    "nvme": [
        "zero.offload_optimizer=nvme", "zero.nvme_path={folder}/nvme", "optimizer.moments=fp32",
    ],
    "nvme-bf16-moments": [
        "zero.offload_optimizer=nvme", "zero.nvme_path={folder}/nvme", "optimizer.moments=bf16",
    ],
}  # fmt: skip


def shared_memory(root: psutil.Process) -> int:
    """Return the bytes of a process and its descendants; shared ones count once."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def end(root: psutil.Process) -> None:
    for process in (*root.children(recursive=True), root):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def watched(command: list[str], processes: int, log: Path) -> tuple[list[tuple[float, float]], str]:
    """Run a command; return (seconds, bytes) over its life, and why it failed."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    samples, problem, begun = [], "", time.monotonic()
    with log.open("w") as file:
        started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        root = psutil.Process(started.pid)
        while started.poll() is None:
            # The kernel walks all pages for a sample, and delays the program meanwhile.
            if not samples or time.monotonic() - begun > samples[-1][0] + 5:
                samples.append((round(time.monotonic() - begun, 1), shared_memory(root)))
            if psutil.virtual_memory().available < FLOOR:
                problem = "stopped: less than 1 GB of memory was free"
                end(root)
            time.sleep(0.5)
    if started.returncode and not problem:
        problem = (log.read_text().strip().splitlines() or ["failed"])[-1]
    return samples, problem


def train(way: str, folder: Path, processes: int, overrides: list[str]) -> dict[str, Any]:
    """Train in one way and return its cell."""
    output = folder / way
    keys = [key.format(folder=folder) for key in WAYS[way]]
    keys += ["--fresh", f"train.output={output}", "log.every_steps=1", *overrides]
    command = harness.torchrun(processes, "swin_moe", "train", str(CONFIG), *keys)
    samples, problem = watched(command, processes, folder / f"{way}.log")
    records = []
    if (output / "metrics.jsonl").exists():
        lines = (output / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
    steps = [record for record in records if "train/loss" in record]
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return harness.figure(
        way,
        "s",
        seconds_per_step(output, steps, processes),
        mode="update",
        overrides=[*WAYS[way], *overrides],
        processes=processes,
        peak_gb=round(max((size for _, size in samples), default=0) / GB, 2),
        minutes=round(samples[-1][0] / 60, 1) if samples else 0,
        loss=[round(record["train/loss"], 4) for record in steps],
        top1=next((r["val/top1"] for r in reversed(records) if "val/top1" in r), None),
        split=split(steps),
        memory=[[second, round(size / GB, 2)] for second, size in samples],
        problem=problem,
    )


def seconds_per_step(output: Path, steps: list[dict[str, Any]], processes: int) -> float | None:
    """Return the median of the steps after the first two."""
    if len(steps) < 4:
        return None
    config = load_config(output / "config.yaml")
    batch = config.data.batch_size * config.train.micro_steps * processes
    return round(statistics.median(batch / s["train/images_per_second"] for s in steps[2:]), 2)


def split(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median milliseconds of each recorded part of a step."""
    last = steps[-1] if steps else {}
    names = [name for name in last if name.endswith("_ms") and "moe" not in name]
    return {n: round(statistics.median(s[n] for s in steps[2:] or steps), 1) for n in names}


def print_cells(cells: list[dict[str, Any]]) -> None:
    rows = []
    for cell in cells:
        loss = cell["loss"]
        curve = (
            f"{statistics.mean(loss[:3]):.3f} → {statistics.mean(loss[-3:]):.3f}" if loss else ""
        )
        words = [cell["peak_gb"], cell["ours"], cell["problem"] or curve, cell["minutes"]]
        rows.append([cell["name"], *map(str, words)])
    columns = ["way", "peak GB", "s/step", "loss of the first and last 3 steps", "minutes"]
    harness.report("a billion parameters", columns, rows)


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    options, overrides = parser.parse_known_args()
    steps = 4 if options.quick else options.steps
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in options.ways:
            keys = [f"train.max_steps={steps}", *overrides]
            cells.append(train(way, Path(folder), options.processes, keys))
            print_cells(cells)
    harness.write_json(options.json, cells, config=CONFIG.name)


if __name__ == "__main__":
    main()
