"""Shared tools of the tests on real engines: a tiny training, and waits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
PATIENCE = 480.0  # seconds that a test may take on a slow machine

CONFIG = """\
model: {name: swinv2_moe, img_size: 16, patch_size: 4, in_chans: 1, num_classes: 2, embed_dim: 8,
  depths: [2], num_heads: [1], window_size: 4}
moe: {blocks: [[1]], num_experts: 2}
data: {path: DATA, batch_size: 4, eval_batch_size: 4, num_workers: 0, mean: [0.5], std: [0.5]}
augment: {auto_augment: "", color_jitter: 0.0, random_erase: 0.0, mixup: 0.0, cutmix: 0.0}
schedule: {epochs: 1000000, warmup_epochs: 0}
checkpoint: {every_steps: 10, every_epochs: 1000000}
train: {eval_every_epochs: 1000000, max_steps: 10}
precision: {dtype: fp32}
parallel: {expert_parallel_size: 2}
zero: {stage: 1}
log: {every_steps: 1, tensorboard: false}
"""


def need(*programs: str) -> None:
    """Skip the test if this machine cannot stand for several."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a cluster of this machine")
    missing = [name for name in programs if shutil.which(name, path=search_path()) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: .ci/run installs them")


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def environment(**extra: str) -> dict[str, str]:
    """Return an environment without variables of an outer launcher or scheduler."""
    outer = ("RANK", "LOCAL_", "WORLD_", "MASTER_", "SLURM", "OMPI_", "PET_", "TORCHELASTIC")
    env = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    return env | {"PATH": search_path(), "COLUMNS": "200"} | extra


def write_config(folder: Path) -> Path:
    """Write a config into ``folder``, with 32 + 8 images in two classes; the run is ``run``."""
    draw = random.Random(0)
    for split, count in (("train", 16), ("val", 4)):
        for label in ("dark", "light"):
            place = folder / "images" / split / label
            place.mkdir(parents=True)
            for index in range(count):
                shade = draw.randrange(0, 100) + 155 * (label == "light")
                Image.new("L", (16, 16), shade).save(place / f"{index}.png")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("DATA", str(folder / "images")))
    return path


def run_of(folder: Path) -> Path:
    return folder / "run"


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run)), default=0)


def starts(run: Path) -> int:
    return len(worlds(run))


def worlds(run: Path) -> list[int]:
    """Return the number of processes of each start."""
    path = run / "starts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [len(json.loads(line)["hosts"]) for line in lines]


def until(
    done: Callable[[], object],
    what: str,
    patience: float = PATIENCE,
    tell: Callable[[], str] = str,
) -> None:
    """Wait for ``done()``; after ``patience`` seconds fail with ``what`` and ``tell()``."""
    deadline = time.monotonic() + patience
    while not done():
        assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}\n{tell()}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return ports that are free, and that no system gives to a socket that asks for any port."""
    free: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 30_000), 10_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise AssertionError("no port from 20000 to 29999 is free")


class Job:
    """A command in the background, with its output in a file."""

    def __init__(self, command: list[object], output: Path, **env: str) -> None:
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, cwd=output.parent, env=environment(**env),
                start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if "error:" in line]

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        """Kill the command and its descendants, which are in other sessions."""
        if self.alive():
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
