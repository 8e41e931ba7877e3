"""Meters, logs and pictures: JSONL, TensorBoard, progress bar, summary.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class Meter:
    """Running mean that stays on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._count = 0

    def update(self, value: Tensor) -> None:
        self._sum += value.detach().float()
        self._count += 1

    def read(self) -> float:
        """The mean since the last read; NaN without updates. Synchronises the host."""
        mean = float(self._sum) / self._count if self._count else float("nan")
        self._sum.zero_()
        self._count = 0
        return mean


class ExpertLoad:
    """Assignments per expert and layer since the last read, on the device."""

    def __init__(self, layer_names: list[str], num_experts: int, device: torch.device) -> None:
        self.layer_names = layer_names
        self.counts = torch.zeros(len(layer_names), num_experts, device=device)
        self.dropped = torch.zeros(len(layer_names), device=device)

    def update(self, counts: Tensor, dropped: Tensor) -> None:
        self.counts += counts
        self.dropped += dropped

    def buffer(self) -> Tensor:
        """Both as one tensor [layers, E + 1], to be summed over ranks before :meth:`record`."""
        return torch.cat((self.counts, self.dropped[:, None]), 1)

    def record(self, total: Tensor) -> Record:
        """Flat keys from a summed :meth:`buffer`; loads are shares that sum to one."""
        record: Record = {}
        for name, row in zip(self.layer_names, total.tolist(), strict=True):
            *counts, dropped = row
            assignments = max(sum(counts), 1.0)
            record[f"moe/{name}/load"] = [round(count / assignments, 5) for count in counts]
            record[f"moe/{name}/drop_rate"] = 100.0 * dropped / assignments
        self.counts.zero_()
        self.dropped.zero_()
        return record


class MetricLog:
    """``metrics.jsonl`` and TensorBoard events of a run; only rank 0 makes one.

    Args:
        folder: the run directory. resume_step: records after that step are of a life that the
            resume takes back, and are cut off.
    """

    def __init__(self, folder: Path, tensorboard: bool, resume_step: int | None) -> None:
        self.path = folder / "metrics.jsonl"
        kept = []
        if resume_step is not None:
            kept = [r for r in read_metrics(folder) if r["step"] <= resume_step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        purge = None if resume_step is None else resume_step + 1
        self._writer = None
        if tensorboard:
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, record: Record) -> None:
        """Append one record with keys ``step`` and ``epoch``; lists go to JSONL only."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is None:
            return
        for key, value in record.items():
            if key in ("step", "epoch"):
                continue
            if isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, record["step"])
            elif key.endswith("/load"):
                for expert, share in enumerate(value):
                    self._writer.add_scalar(f"{key}/expert{expert}", share, record["step"])

    def image(self, key: str, path: Path, step: int) -> None:
        if self._writer is not None:
            import matplotlib.image

            pixels = matplotlib.image.imread(path)
            self._writer.add_image(key, pixels[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run; a last line that a kill cut off is left out."""
    records = []
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def progress_bar(enabled: bool) -> Progress:
    """Bar with loss, rate, gradient norm, images/s and time to go; none if piped to a file."""
    console = Console()
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
        transient=True,
    )


def draw_summary(folder: Path) -> Path | None:
    """Draw ``summary.png``: loss, accuracy, and a heat map of expert load per MoE layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(folder)
    if not records:
        return None
    layers = [k[4:-5] for k in _last_with(records, "moe/") if k.endswith("/load")]
    columns = max(2, min(3, len(layers)))
    rows = 1 + -(-len(layers) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    _draw_curves(axes[0, 0], records, {"train/loss": "training", "val/loss": "held out"}, "loss")
    _draw_curves(axes[0, 1], records, {"val/top1": "top-1", "val/top5": "top-5"}, "accuracy (%)")
    for axis, layer in zip(axes[1:].flat, layers, strict=False):
        _draw_load(figure, axis, records, layer)
    for axis in [*axes[0, 2:], *axes[1:].flat[len(layers) :]]:
        axis.set_axis_off()
    figure.suptitle(folder.name)
    path = folder / "summary.png"
    temporary = folder / ".summary.png"
    figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    temporary.replace(path)
    return path


def _last_with(records: list[Record], prefix: str) -> Record:
    for record in reversed(records):
        if any(key.startswith(prefix) for key in record):
            return record
    return {}


def _draw_curves(axis: Any, records: list[Record], keys: dict[str, str], title: str) -> None:
    for key, label in keys.items():
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if "val" in key else "")
    axis.set(title=title, xlabel="update")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def _draw_load(figure: Any, axis: Any, records: list[Record], layer: str) -> None:
    key = f"moe/{layer}/load"
    chosen = [r for r in records if key in r]
    load = np.array([r[key] for r in chosen]).T  # [E, time]
    even = 1 / load.shape[0]
    steps = [r["step"] for r in chosen]
    image = axis.imshow(
        load / even,
        aspect="auto",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
        interpolation="nearest",
        extent=(steps[0], max(steps[-1], steps[0] + 1), load.shape[0] - 0.5, -0.5),
    )
    axis.set(title=f"expert load, {layer}", xlabel="update", ylabel="expert")
    axis.set_yticks(range(0, load.shape[0], max(1, load.shape[0] // 8)))
    figure.colorbar(image, ax=axis, label="× even share")
