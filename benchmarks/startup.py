"""Wall and CPU seconds that each command takes to start.

``python -m benchmarks.startup [--quick] [--json PATH]``

Every round runs all commands once, each as a new process; figures are medians, and ratios are to
``python -c "import torch"`` of the same rounds. ``train`` counts until its header is printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.harness import arguments, report, write_json

ROOT = Path(__file__).parent.parent
MICRO = ROOT / "configs/fashion_mnist/swin_moe_micro.yaml"
DATA = ROOT / "swin_moe/data/fashion_mnist"
BASE, DEEPSPEED = "import torch", "import torch, deepspeed"
HEADER = b"parameters"  # a word of the header
Figure = tuple[float, float]  # wall and CPU seconds


def environment() -> dict[str, str]:
    """Return the environment of a shell without a terminal."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}


def whole(command: list[str]) -> Figure:
    """Time a command from its start to its end.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
    assert process.stdout is not None
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def to_header(command: list[str]) -> Figure:
    """Time a training from its start to its header, and kill it then.

    Raises:
        SystemExit: it ended before.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment(), cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if HEADER in line:
            break
    else:
        raise SystemExit(f"{' '.join(command)}: exit code {process.wait()}")
    wall = time.perf_counter() - began
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    cpu = sum(sum(member.cpu_times()[:4]) for member in family)
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    return wall, cpu


def contenders(folder: Path) -> dict[str, Callable[[], Figure]]:
    """Return the commands to time, by name.

    Args:
        folder: for the files of the commands.
    """
    python = [sys.executable]
    program = [*python, "-m", "swin_moe"]
    run = folder / "run"
    subprocess.run(
        [*program, "train", str(MICRO), f"train.output={run}", "train.max_steps=1"],
        check=True, stdout=subprocess.DEVNULL, env=environment(), cwd=ROOT,
    )  # fmt: skip
    shards = folder / "shards"
    shutil.copytree(DATA, shards)
    train = ["train", str(MICRO), "data.num_workers=0"]

    def fresh(words: list[str]) -> Figure:
        shutil.rmtree(folder / "new", ignore_errors=True)
        return to_header([*words, f"train.output={folder / 'new'}"])

    def local(processes: int) -> list[str]:
        return ["launch/local.sh", "--processes", str(processes), *train[1:]]

    commands = {
        "--help": ["--help"],
        "models": ["models"],
        "checkpoint list": ["checkpoint", "list", str(run)],
        "checkpoint verify": ["checkpoint", "verify", str(run)],
        "launch --dry-run": ["launch", "--on", "local", "--dry-run", str(MICRO)],
        "data verify (12,000 images)": [
            "data", "verify", str(shards), "--output", str(folder / "bad.jsonl")
        ],
    }  # fmt: skip
    found: dict[str, Callable[[], Figure]] = {
        BASE: lambda: whole([*python, "-c", BASE]),
        DEEPSPEED: lambda: whole([*python, "-c", DEEPSPEED]),
    }
    for name, words in commands.items():
        found[name] = lambda words=words: whole([*program, *words])  # type: ignore[misc]
    found["train to its header, 1 process"] = lambda: fresh([*program, *train])
    for processes in (1, 2):
        name = f"launch/local.sh to the header, {processes} rank{'s' * (processes > 1)}"
        found[name] = lambda count=processes: fresh(local(count))  # type: ignore[misc]
    return found


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rounds = 2 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        todo = contenders(Path(folder))
        figures: dict[str, list[Figure]] = {name: [] for name in todo}
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            for name, run in todo.items():
                figures[name].append(run())
    medians = {
        name: tuple(statistics.median(column) for column in zip(*some, strict=True))
        for name, some in figures.items()
    }
    rows, cells = [], []
    for name, (wall, cpu) in medians.items():
        ratios = [wall / medians[BASE][0], cpu / medians[BASE][1], wall / medians[DEEPSPEED][0]]
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f}", *(f"{ratio:.2f}" for ratio in ratios)])
        cells.append(
            {
                "name": name,
                "dtype": "",
                "mode": "start",
                "unit": "s",
                "ours": round(wall, 3),
                "cpu": round(cpu, 3),
                "peers": {other: round(medians[other][0], 3) for other in (BASE, DEEPSPEED)},
                "speedup": round(medians[BASE][0] / wall, 2),
                "to_import_torch": {"wall": round(ratios[0], 2), "cpu": round(ratios[1], 2)},
                "to_import_torch_and_deepspeed": round(ratios[2], 2),
            }
        )
    heads = ["command", "wall s", "CPU s", "wall ÷ torch", "CPU ÷ torch", "wall ÷ torch, deepspeed"]
    report("start", heads, rows)
    write_json(options.json, cells, rounds=rounds)


if __name__ == "__main__":
    main()
