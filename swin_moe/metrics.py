"""Meters and logs: JSONL, TensorBoard, progress bar."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("swin_moe")

Record = dict[str, Any]

CURVES = 16  # experts of a layer that get a curve each in TensorBoard
HISTOGRAM = np.append(np.arange(0.0, 4.0, 0.1), [4.0, 8.0, 1e3])  # of load over the even share
CELL = 12  # pixels of a heat map per expert and layer


class Meter:
    """Running mean of the finite values, on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)  # values, their number

    def update(self, value: Tensor) -> None:
        value = value.detach().float()
        finite = torch.isfinite(value)
        self._sums += torch.stack((torch.where(finite, value, 0.0), finite.float()))

    def read(self) -> float:
        """The mean since the last read; NaN without values. Synchronises the host."""
        total, count = self._sums.tolist()
        self._sums.zero_()
        return total / count if count else float("nan")


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
        temporary = self.path.with_suffix(".tmp")  # a kill here must not lose what there is
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(self.path)
        purge = None if resume_step is None else resume_step + 1
        self._step = resume_step or 0
        self._loads: list[list[float]] = []  # of the layers, as last written
        self._failed = False
        self._writer: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imports tensorboard

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, record: Record) -> None:
        """Append one record with keys ``step`` and ``epoch``.

        TensorBoard gets every number, and of the experts' loads, which may be thousands, a curve
        each for up to ``CURVES`` experts a layer, else a histogram over the experts; with each
        evaluation it gets a picture of the last loads of all layers, see :func:`heat_map`.
        """
        self._step = record["step"]
        with self._whatever_the_disk(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        with self._whatever_the_disk():
            self._show(record)

    @contextlib.contextmanager
    def _whatever_the_disk(self) -> Iterator[None]:
        """A full disk is no reason to end the training: it is told once."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                log.warning("metrics cannot be written: %s; training goes on", error)
            self._failed = True

    def _show(self, record: Record) -> None:
        if self._writer is None:
            return
        step = record["step"]
        for key, value in record.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                self._writer.add_scalar(key, value, step)
        loads = {key: value for key, value in record.items() if key.endswith("/load")}
        for key, load in loads.items():
            self._write_load(key, load, step)
        self._loads = list(loads.values()) or self._loads
        if self._loads and "val/top1" in record:
            self._writer.add_image("moe/load", heat_map(self._loads), step, dataformats="HWC")

    def _write_load(self, key: str, load: list[float], step: int) -> None:
        assert self._writer is not None
        if len(load) <= CURVES:
            for expert, share in enumerate(load):
                self._writer.add_scalar(f"{key}/expert{expert}", share, step)
        else:
            even = np.array(load) * len(load)
            self._writer.add_histogram(key, even, step, bins=HISTOGRAM)

    def image(self, key: str, path: Path) -> None:
        """Show a PNG at the step of the last record."""
        if self._writer is not None:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            with self._whatever_the_disk():
                self._writer.add_image(key, pixels, self._step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            with self._whatever_the_disk():
                self._writer.close()


def heat_map(loads: list[list[float]]) -> np.ndarray:
    """Loads [layers][E] as pixels [H, W, 3] uint8: a row per layer, a column per expert.

    White is the even share; the redder, the more, up to twice as much; the bluer, the less.
    """
    load = np.array(loads)
    excess = np.clip(load * load.shape[1] - 1.0, -1.0, 1.0)[..., None]
    red, blue = np.array([178.0, 24.0, 43.0]), np.array([33.0, 102.0, 172.0])  # ends of RdBu
    pixels = 255.0 + np.abs(excess) * (np.where(excess > 0, red, blue) - 255.0)
    return pixels.round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run; a line that is no record, such as half of one, is left out."""
    records = []
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
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
