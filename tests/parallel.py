"""Run commands and functions in fresh processes, as a launcher would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MICRO = ROOT / "configs/fashion_mnist/swin_moe_micro.yaml"
# A model and schedule small enough for a test; the data and the road are the real ones.
SMALL = [
    "model.embed_dim=16", "model.depths=[1, 2]", "model.num_heads=[1, 2]",
    "moe.blocks=[[], [1]]", "moe.num_experts=4", "data.num_workers=0", "data.batch_size=50",
    "schedule.epochs=1", "schedule.warmup_epochs=0.1", "log.tensorboard=false",
]  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }
    return env | extra


def command(arguments: list[str], processes: int = 1) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "swin_moe", *arguments]
    torchrun = [sys.executable, "-m", "swin_moe.torchrun", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(processes), "-m", "swin_moe", *arguments]


def swin_moe(
    *arguments: str, processes: int = 1, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the command line in fresh processes and return what it printed."""
    return subprocess.run(
        command(list(arguments), processes),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def train(folder: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Train the small model into ``folder``."""
    return swin_moe(
        "train", str(MICRO), *SMALL, f"train.output={folder}",
        f"parallel.expert_parallel_size={processes}", *overrides, processes=processes,
    )  # fmt: skip


def run_worker(script: str, folder: Path, processes: int, timeout: float = 300) -> None:
    """Run ``python -m tests.workers.<script> folder`` on several processes; fail if one fails."""
    arguments = [sys.executable, "-m", "swin_moe.torchrun", "--standalone"]
    arguments += ["--nproc-per-node", str(processes), "-m", f"tests.workers.{script}", str(folder)]
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The single error line; there is no traceback around it."""
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("swin-moe: error: ")
