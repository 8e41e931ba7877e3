"""Mixture of experts compared with dense on the bundled Fashion-MNIST, at equal activated FLOPs.

Trains named settings, each a list of overrides of the micro config, with several seeds. The figures
are of the final epoch: the best epoch would be a selection on the held-out images. Runs with the
same seed are paired: they have the same order of images and the same augmentation. Complete runs
are not repeated, so an interrupted benchmark resumes.

    python -m benchmarks.learning [--group main search routers] [--json PATH] [--plot PATH]
        [--folder DIR] [--jobs N] [--quick]
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import harness
from swin_moe.config import Config, ConfigError, load_config
from swin_moe.models.cost import count
from swin_moe.reporting.metric_log import read_metrics

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "configs" / "fashion_mnist" / "swin_moe_micro.yaml"
DENSE = ["moe.blocks=[]"]
# One process with the global batch that the config has on the two processes of `make train`.
ALIKE = ["data.batch_size=100", "data.num_workers=0", "log.tensorboard=false"]
# Quantiles of Student's t for a two-sided interval of 95 %, by degrees of freedom from 1.
STUDENT = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]

Settings = dict[str, list[str]]


@dataclass(frozen=True)
class Group:
    """Settings under one budget; ``against`` is the one with which the others are compared."""

    settings: Settings
    seeds: int
    epochs: int
    against: str = "dense"


# The start of the search, written out so that it does not change with the micro config.
START = [
    "moe.blocks=[[],[0,1],[0,1]]", "moe.num_experts=8", "moe.top_k=1", "moe.capacity_factor=1.25",
    "moe.eval_capacity_factor=0", "moe.balance=gshard", "moe.aux_loss_weight=0.01",
    "moe.gate_noise=1.0", "moe.normalize_gate=false", "moe.init_std=0.02", "moe.fc2_bias=true",
    "moe.drop_rate=0.0", "moe.gate_after_norm=true",
]  # fmt: skip
BEFORE = "moe.gate_after_norm=false"
# One factor at a time, save for the gate before the norm with the fewer layers it began with.
FACTORS: Settings = {
    "start": [],
    "gate before the norm": [BEFORE],
    "gate before the norm, blocks [[],[1],[1]]": [BEFORE, "moe.blocks=[[],[1],[1]]"],
    "normalized gate": ["moe.normalize_gate=true"],
    "blocks [[],[1],[1]]": ["moe.blocks=[[],[1],[1]]"],
    "every block": ["moe.blocks=[[0,1],[0,1],[0,1]]"],
    "capacity 1": ["moe.capacity_factor=1.0"],
    "capacity 2": ["moe.capacity_factor=2.0"],
    "dropless": ["moe.capacity_factor=0"],
    "importance and load": ["moe.balance=importance_load"],
    "balance 0.001": ["moe.aux_loss_weight=0.001"],
    "balance 0.1": ["moe.aux_loss_weight=0.1"],
    "balance 0.3": ["moe.aux_loss_weight=0.3"],
    "no gate noise": ["moe.gate_noise=0"],
    "init 0.005": ["moe.init_std=0.005"],
    "no fc2 bias": ["moe.fc2_bias=false"],
    "expert dropout 0.1": ["moe.drop_rate=0.1"],
    "4 experts": ["moe.num_experts=4"],
    "16 experts": ["moe.num_experts=16"],
}
ROUTERS: Settings = {
    "linear": [],
    "cosine": ["moe.router=cosine"],
    "top-2": ["moe.top_k=2"],
    "sigmoid, bias": [
        "moe.score=sigmoid", "moe.balance=none", "moe.expert_bias_update_rate=0.001",
    ],
    "expert choice": ["moe.routing=expert_choice"],
    "soft": ["moe.routing=soft", "moe.slots_per_expert=2", "moe.gate_after_norm=false"],
}  # fmt: skip
GROUPS: dict[str, Group] = {
    "main": Group({"dense": DENSE, "moe": []}, seeds=5, epochs=12),
    "search": Group(
        {"dense": DENSE, **{name: START + changes for name, changes in FACTORS.items()}},
        seeds=2,
        epochs=6,
    ),
    "routers": Group({"dense": DENSE, **ROUTERS}, seeds=3, epochs=6),
}


@dataclass(frozen=True)
class Run:
    """One training of a setting of a group, with a seed."""

    group: str
    setting: str
    seed: int
    epochs: int
    overrides: tuple[str, ...]
    folder: Path

    def arguments(self) -> list[str]:
        """Return the overrides of the micro config."""
        own = [f"schedule.epochs={self.epochs}", f"train.seed={self.seed}"]
        return [*ALIKE, *own, f"train.output={self.folder}", *self.overrides]

    def epochs_done(self) -> int:
        evaluated = [r["epoch"] for r in read_metrics(self.folder) if "val/top1" in r]
        return int(max(evaluated, default=0))

    def same_config(self) -> bool:
        """Return whether the folder's run was trained with the same settings."""
        try:
            found = load_config(self.folder / "config.yaml")
        except ConfigError:  # none there, or one of another version
            return False
        return _trained(found) == _trained(load_config(MICRO, self.arguments()))

    def complete(self) -> bool:
        return self.epochs_done() >= self.epochs and self.same_config()


def slug(setting: str) -> str:
    """Return a setting's name as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", setting.lower()).strip("-")


def _trained(config: Config) -> dict[str, Any]:
    """Return the settings that decide a run's figures."""
    names = ("model", "data", "augment", "optimizer", "schedule", "zero", "precision")
    moe = config.moe if config.moe.enabled else None  # of no effect on a dense model
    return {**{n: getattr(config, n) for n in names}, "moe": moe, "seed": config.train.seed}


def runs_of(name: str, options: argparse.Namespace) -> list[Run]:
    """Return the runs seed by seed: an interrupted group has all settings of the first seeds."""
    group = GROUPS[name]
    settings, epochs, seeds = list(group.settings.items()), group.epochs, group.seeds
    if options.quick:
        settings, epochs, seeds = settings[:2], 1, 1
    return [
        Run(
            name,
            setting,
            seed,
            epochs,
            tuple(overrides),
            options.folder / name / slug(setting) / str(seed),
        )
        for seed in range(seeds)
        for setting, overrides in settings
    ]


def train(run: Run, threads: int) -> None:
    """Train to the end in another process, from the last checkpoint if there is one.

    Raises:
        RuntimeError: the process failed; the message is the end of its output.
    """
    fresh = run.folder.exists() and not run.same_config()
    command = [sys.executable, "-m", "swin_moe", "train", str(MICRO), *run.arguments()]
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **harness.ALLOCATOR, "PYTHONPATH": search_path}
    done = subprocess.run(
        [*command, *(["--fresh"] if fresh else [])],
        env={**environment, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{run.folder} failed:\n{done.stdout[-2000:]}")
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # 50 MB, of no more use


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Train the incomplete runs, ``jobs`` at a time, with a bar of epochs."""
    waiting = [run for run in runs if not run.complete()]
    if not waiting:
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    pool = ThreadPoolExecutor(jobs)
    with Progress(*columns, TextColumn("epochs"), TimeElapsedColumn()) as progress:
        bar = progress.add_task(f"{len(waiting)} runs", total=sum(run.epochs for run in waiting))
        futures = [pool.submit(train, run, threads) for run in waiting]
        try:
            while not all(future.done() for future in futures):
                raise_first(futures)
                progress.update(bar, completed=sum(run.epochs_done() for run in waiting))
                time.sleep(2)
            raise_first(futures)
            progress.update(bar, completed=sum(run.epochs for run in waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def raise_first(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        if future.done():
            future.result()


# --------------------------------------------------------------------------------------------
# Figures


def curve(run: Run, key: str) -> list[float]:
    """Return a held-out figure after each epoch."""
    return [record[key] for record in read_metrics(run.folder) if key in record]


def training_loss(run: Run) -> float:
    """Return the mean training loss of the last epoch, without the balance loss."""
    last = [
        r for r in read_metrics(run.folder) if "train/loss" in r and r["epoch"] > run.epochs - 1
    ]
    losses = [record["train/loss"] for record in last]
    return statistics.fmean(losses) if losses else float("nan")


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the cell of a setting: the final figures by seed, and the model's cost."""
    config = load_config(MICRO, runs[0].arguments())
    cost = count(config.model, config.moe)
    top1 = [curve(run, "val/top1")[-1] for run in runs]
    return harness.figure(
        runs[0].setting,
        "% top-1",
        round(statistics.fmean(top1), 2),
        mode=runs[0].group,
        overrides=list(runs[0].overrides),
        epochs=runs[0].epochs,
        seeds=[run.seed for run in runs],
        parameters=cost.parameters,
        activated=cost.activated,
        macs=cost.macs,
        top1=top1,
        loss=[round(curve(run, "val/loss")[-1], 4) for run in runs],
        training_loss=[round(training_loss(run), 4) for run in runs],
    )


def paired(values: dict[int, float], base: dict[int, float]) -> tuple[float, float]:
    """Return the mean difference over common seeds, and half the width of its 95 % interval."""
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    mean = statistics.fmean(differences) if differences else float("nan")
    if len(differences) < 2:
        return mean, float("nan")
    degrees = min(len(differences) - 1, len(STUDENT))
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, STUDENT[degrees - 1] * error


def spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def difference(cell: dict[str, Any], base: dict[str, Any], key: str, digits: int) -> str:
    if cell is base or not base["seeds"]:
        return ""
    by_seed = [dict(zip(c["seeds"], c[key], strict=True)) for c in (cell, base)]
    mean, half = paired(by_seed[0], by_seed[1])
    return f"{mean:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


COLUMNS = ["setting", "seeds", "top-1 (%)", "Δ top-1", "held-out loss", "Δ loss",
           "training loss", "parameters", "activated"]  # fmt: skip


def rows(cells: Sequence[dict[str, Any]], against: str) -> list[list[str]]:
    """Return a group's table: means ± standard deviations, paired differences ± 95 % intervals."""
    base: dict[str, Any] = next((cell for cell in cells if cell["name"] == against), {"seeds": []})
    return [
        [
            cell["name"],
            str(len(cell["top1"])),
            spread(cell["top1"], 2),
            difference(cell, base, "top1", 2),
            spread(cell["loss"], 4),
            difference(cell, base, "loss", 4),
            spread(cell["training_loss"], 4),
            f"{cell['parameters'] / 1e6:.2f} M",
            f"{cell['activated'] / 1e6:.2f} M",
        ]
        for cell in cells
    ]


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Draw held-out accuracy and loss of each setting of a group: mean and standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    titles = {"val/top1": "held-out top-1 (%)", "val/loss": "held-out loss"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for setting in dict.fromkeys(run.setting for run in runs):
            curves = np.array([curve(run, key) for run in runs if run.setting == setting])
            epochs = np.arange(1, curves.shape[1] + 1)
            mean, deviation = curves.mean(0), curves.std(0, ddof=min(1, len(curves) - 1))
            axis.plot(epochs, mean, marker=".", label=f"{setting}, n = {len(curves)}")
            axis.fill_between(epochs, mean - deviation, mean + deviation, alpha=0.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--group", nargs="+", choices=list(GROUPS), default=["main"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--plot", type=Path, help="draw the curves of the first group here")
    options = parser.parse_args()
    groups = {name: runs_of(name, options) for name in options.group}
    try:
        train_all([run for runs in groups.values() for run in runs], options.jobs)
    except RuntimeError as error:
        Console(stderr=True).print(str(error), markup=False)
        raise SystemExit(1) from None
    cells: list[dict[str, Any]] = []
    for name, runs in groups.items():
        settings = dict.fromkeys(run.setting for run in runs)
        found = [figures([run for run in runs if run.setting == setting]) for setting in settings]
        title = f"{name}, {runs[0].epochs} epochs; differences to {GROUPS[name].against}"
        harness.report(title, COLUMNS, rows(found, GROUPS[name].against))
        cells += found
    if options.plot:
        draw(options.plot, groups[options.group[0]])
    harness.write_json(options.json, cells)


if __name__ == "__main__":
    main()
