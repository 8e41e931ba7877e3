"""From a folder of JPEGs to a trained model through kills: no sample is lost or read twice.

Writes generated JPEGs of realistic size as class folders, prepares shards with a kill in between,
and verifies every sample and digest. Then it trains an epoch with three kills at random moments,
and the same epoch undisturbed. The logged losses of both must be equal to the bit.

    python -m benchmarks.exercise [--folder DIR] [--json PATH] [--quick]

The 100,000 images take 10 GB of disk and, on two cores, about an hour.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
from rich.console import Console

from benchmarks import harness
from benchmarks.photos import photo
from swin_moe.data.source import open_splits
from swin_moe.data.tools.parallel import in_processes

CLASSES, BASES = 20, 60  # class folders; images from which all others are cut
IMAGES, QUICK = 100_000, 6_000
CONFIG = """\
model:
  name: swinv2_moe
  img_size: 32
  window_size: 4
  patch_size: 2
  embed_dim: 32
  depths: [1, 1]
  num_heads: [1, 2]
  num_classes: 20
moe:
  blocks: [[], [0]]
  num_experts: 4
data:
  batch_size: 124
  num_workers: 1
augment:
  auto_augment: ''
  color_jitter: 0.0
schedule:
  epochs: 1
  warmup_epochs: 0.05
optimizer:
  base_lr: 2.0e-3
parallel:
  expert_parallel_size: auto
log:
  every_steps: 10
"""


def write_images(part: range) -> int:
    """Write a part of the images: cuts of a few large ones, tinted by class."""
    folder, bases = _MADE
    for index in part:
        rng = np.random.default_rng(index)
        label = index % CLASSES
        base = bases[rng.integers(len(bases))]
        top, left = rng.integers(base.shape[0] - 375), rng.integers(base.shape[1] - 500)
        pixels = base[top : top + 375, left : left + 500].astype(np.float32)
        angle = 2 * np.pi * label / CLASSES
        pixels += 40 * np.cos(angle + np.array([0, 2, 4]) * np.pi / 3)
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8)), 97, colorsubsampling="420"
        )
        name = f"n{label:08d}"
        (folder / name / f"{name}_{index}.JPEG").write_bytes(data)
    return len(part)


_MADE: Any = None  # folder and bases, for the forked processes


def make_folder(folder: Path, images: int) -> None:
    global _MADE
    bases = [np.asarray(photo(seed, 800, 600)) for seed in range(BASES)]
    for label in range(CLASSES):
        (folder / f"n{label:08d}").mkdir(parents=True, exist_ok=True)
    _MADE = folder, bases
    for _ in in_processes(
        write_images, [range(i, min(i + 500, images)) for i in range(0, images, 500)], 2
    ):
        pass


def run(*command: str, kill_when: Callable[[], bool] | None = None) -> tuple[int, float, int]:
    """Run a program, perhaps to a kill; return exit code, seconds and peak memory in bytes."""
    begun = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while kill_when is not None and process.poll() is None:
        if kill_when():
            first = psutil.Process(process.pid)
            for one in [first, *first.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            break
        time.sleep(0.05)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.monotonic() - begun, usage.ru_maxrss << 10


def swin_moe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "swin_moe", *arguments]


def train(config: Path, shards: Path, output: Path) -> list[str]:
    launcher = ["-m", "swin_moe.launch.torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    settings = [f"data.path={shards}", f"train.output={output}", "checkpoint.every_steps=50"]
    return [sys.executable, *launcher, "swin_moe", "train", str(config), *settings]


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps(folder: Path) -> int:
    return max((record["step"] for record in records(folder)), default=0)


class Exercise:
    """The steps of the exercise, each with a cell."""

    def __init__(self, folder: Path, images: int, seed: int) -> None:
        self.folder, self.images, self.draw = folder, images, random.Random(seed)
        self.cells: list[dict[str, Any]] = []
        self.console = Console(stderr=True)

    def report(self, step: str, seconds: float, result: str) -> None:
        cell = harness.figure(step, "s", round(seconds, 1), mode="exercise", result=result)
        self.cells.append(cell)
        self.console.print(f"{step}: {result} ({seconds:.0f} s)", highlight=False)

    def prepare(self) -> Path:
        begun = time.monotonic()
        source, shards = self.folder / "images", self.folder / "shards"
        make_folder(source, self.images)
        size = sum(path.stat().st_size for path in source.rglob("*.JPEG"))
        self.report(
            "write JPEGs", time.monotonic() - begun, f"{self.images:,} files, {size / 1e9:.2f} GB"
        )
        command = swin_moe(
            "prepare-data", str(source), str(shards), "--val", "0.02", "--shard-size", "64"
        )
        total = size / 64e6
        wanted = max(1, int(total * self.draw.uniform(0.2, 0.7)))
        code, taken, _ = run(
            *command, kill_when=lambda: len(list(shards.glob("train-*.tar"))) >= wanted
        )
        assert code == -signal.SIGKILL, code
        there = len(list(shards.glob("train-*.tar")))
        self.report("prepare, killed", taken, f"{there} shards written")
        code, taken, peak = run(*command)
        assert code == 0, code
        splits = open_splits(shards)
        counted = sum(len(split) for split in splits.values())
        assert counted == self.images, counted
        names = {
            split.key(i).rsplit("-", 1)[-1]
            for split in splits.values()
            for i in range(0, len(split), 97)
        }
        assert len(names) == sum(len(range(0, len(split), 97)) for split in splits.values())
        parts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
        self.report("prepare, gone on", taken, f"{parts}; peak {peak / 1e6:.0f} MB a process")
        code, taken, _ = run(*swin_moe("data", "verify", str(shards)))
        assert code == 0, code
        self.report("verify", taken, "every sample decoded, every digest right")
        return shards

    def train(self, shards: Path, kills: int) -> None:
        config = self.folder / "exercise.yaml"
        config.write_text(CONFIG)
        whole, killed = self.folder / "undisturbed", self.folder / "killed"
        code, taken, _ = run(*train(config, shards, whole))
        assert code == 0, code
        last = steps(whole)
        self.report("train, undisturbed", taken, f"{last} updates, {self._summary(whole)}")
        at = sorted(self.draw.sample(range(last // 8, last - 10), kills))
        for step in at:
            code, taken, _ = run(
                *train(config, shards, killed), kill_when=lambda at=step: steps(killed) >= at
            )
            assert code != 0, code
            self.report("train, killed", taken, f"after update {steps(killed)} was logged")
        code, taken, _ = run(*train(config, shards, killed))
        assert code == 0, code
        pairs = [
            {r["step"]: r["train/loss"] for r in records(folder) if "train/loss" in r}
            for folder in (whole, killed)
        ]
        assert pairs[0] == pairs[1], "the losses differ"
        self.report(
            "train, gone on",
            taken,
            f"{len(pairs[0])} logged losses equal to the bit; {self._summary(killed)}",
        )

    def _summary(self, folder: Path) -> str:
        losses = [r["train/loss"] for r in records(folder) if "train/loss" in r]
        waits = [r["train/data_wait_ms"] for r in records(folder) if "train/data_wait_ms" in r]
        rates = [r["train/images_per_second"] for r in records(folder) if "train/loss" in r]
        return (
            f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {np.median(rates):.0f} images/s, "
            f"{np.median(waits):.0f} ms waiting for data an update"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument(
        "--folder", type=Path, help="keep everything here (default: a temporary one)"
    )
    options = parser.parse_args(argv)
    images = QUICK if options.quick else IMAGES
    folder = options.folder or Path(tempfile.mkdtemp(prefix="swin_moe_exercise_"))
    exercise = Exercise(folder, images, seed=0)
    try:
        exercise.train(exercise.prepare(), kills=3)
    finally:
        rows = [[cell["name"], str(cell["ours"]), cell["result"]] for cell in exercise.cells]
        harness.report("exercise", ["step", "seconds", "result"], rows)
        harness.write_json(options.json, exercise.cells, images=images)
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
