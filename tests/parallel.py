"""Runs the program and workers in other processes, as a launcher does.

They are forked from the session's server, which has imported everything (``tests/server.py``).
``fresh=True`` starts a real interpreter instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests import server

PATIENCE = 240.0  # seconds that a wait may take on a busy machine; a hang takes longer
ROOT = Path(__file__).parent.parent
MICRO = ROOT / "configs/fashion_mnist/swin_moe_micro.yaml"
# A model and a schedule small enough for a test.
SMALL = [
    "model.embed_dim=16", "model.depths=[1, 2]", "model.num_heads=[1, 2]",
    "moe.blocks=[[], [1]]", "moe.num_experts=4", "data.num_workers=0", "data.batch_size=50",
    "schedule.epochs=1", "schedule.warmup_epochs=0.1", "log.tensorboard=false",
]  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }
    return env | extra


class Running:
    """A running program and its output."""

    def __init__(self, words: list[str], env: dict[str, str], fresh: bool, folder: Path) -> None:
        self.words = words
        # Files: a full pipe that nobody reads would stop the program.
        self.output, self.errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.output, "stderr": self.errors}
        if fresh:
            command = [sys.executable, "-m", *words]
            self.process = subprocess.Popen(
                command, env=env, cwd=folder, start_new_session=True, **streams
            )
        else:
            self.process = server.child(words, env, folder, self.output, self.errors)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill_all(self) -> None:
        """Send SIGKILL to the program and its descendants in any session."""
        try:
            program = psutil.Process(self.pid)
            family = [program, *program.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # the ranks end with the launcher
                member.kill()
        self.process.wait(60)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end; after ``timeout`` seconds kill the program and raise."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(
                f"{' '.join(self.words)} took over {timeout:g} s\n{self.printed()}"
                f"{self.complaints()}"
            ) from None

    def printed(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def complaints(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def finish(self, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        code = self.wait(timeout)
        return subprocess.CompletedProcess(self.words, code, self.printed(), self.complaints())

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        done = self.finish(timeout)
        return done.stdout, done.stderr


def start(
    *words: str,
    processes: int = 1,
    options: tuple[str, ...] = (),
    fresh: bool = False,
    folder: Path = ROOT,
    **extra: str,
) -> Running:
    """Start ``python -m words``, with several processes by our torchrun.

    Args:
        options: of torchrun.
    """
    if processes > 1 or options:
        torchrun = ["swin_moe.launch.torchrun", "--standalone", "--nproc-per-node", str(processes)]
        words = (*torchrun, *options, "-m", *words)
    return Running([*words], environment(**extra), fresh, folder)


def swin_moe(
    *arguments: str, processes: int = 1, timeout: float = PATIENCE, **options
) -> subprocess.CompletedProcess[str]:
    """Run the command line and return its output."""
    return start("swin_moe", *arguments, processes=processes, **options).finish(timeout)


def training(folder: Path, *overrides: str, processes: int = 1, config: Path = MICRO) -> list[str]:
    """Return the arguments that train the small model into ``folder``."""
    return [
        "train", str(config), *SMALL, f"train.output={folder}",
        f"parallel.expert_parallel_size={processes}", *overrides,
    ]  # fmt: skip


def train(
    folder: Path, *overrides: str, processes: int = 1, config: Path = MICRO, **options
) -> subprocess.CompletedProcess[str]:
    """Train the small model into ``folder``."""
    return swin_moe(
        *training(folder, *overrides, processes=processes, config=config),
        processes=processes,
        **options,
    )


def ranks(launcher: int) -> list[psutil.Process]:
    """Return the processes that train under a launcher, by rank."""
    named = {}
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile
            if (name := process.name()).startswith("swin-moe r"):
                named[process.pid] = (name, process.ppid(), process)
    # A child of a rank has the rank's name until it takes its own.
    ranks = [(name, process) for name, parent, process in named.values() if parent not in named]
    return [process for _, process in sorted(ranks, key=lambda rank: rank[0])]


def run_worker(script: str, folder: Path, processes: int, timeout: float = 300) -> None:
    """Run ``tests/workers/<script>.py`` on several processes; fail if one fails."""
    done = start(
        "tests.workers", script, str(folder), processes=processes, options=("--max-restarts", "0")
    ).finish(timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only error line; check that there is no traceback."""
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("swin-moe: error: ")
