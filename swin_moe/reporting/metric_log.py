"""Meters and logs: JSONL, TensorBoard, progress bar."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ..common.terminal import Terminal
from ..common.text import plain
from ..common.writing import Appender

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


class Events:
    """A TensorBoard event file.

    torch's SummaryWriter writes in a thread. A full disk ends that thread with a traceback, and
    whoever then waits for it waits for ever.

    Args:
        purge_step: what TensorBoard knows of this step and later ones is of a life taken back.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._summary = Event, summary
        with contextlib.suppress(OSError):  # the first record reports it
            folder.mkdir(exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)
        # TensorBoard reads in the order of names: a clock that was set back must not change it.
        former = [re.match(r"events\.out\.tfevents\.(\d{10})\.", p.name) for p in folder.glob("*")]
        seconds = max([seconds, *(int(one[1]) + 1 for one in former if one)])
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{rest}"
        self._file = Appender(folder / name)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, record: Record, loads: list[list[float]]) -> None:
        """Every number; of the experts' loads, which may be thousands, a curve each for up to
        ``CURVES`` experts a layer, else a histogram over the experts.

        Args:
            loads: of all layers, drawn with each evaluation, see :func:`heat_map`.
        """
        values = self._summary.Summary()
        for key, value in record.items():
            if key.endswith("/load"):
                values.MergeFrom(self._load(key, value))
            elif isinstance(value, (int, float)) and key not in ("step", "epoch"):
                values.MergeFrom(self._summary.scalar(key, value))
        if loads and any(key.startswith("val/") for key in record):
            picture = self._summary.image("moe/load", heat_map(loads), dataformats="HWC")
            values.MergeFrom(picture)
        self._add(step=record["step"], summary=values)

    def _load(self, key: str, load: list[float]) -> Any:
        if len(load) > CURVES:
            return self._summary.histogram(key, np.array(load) * len(load), bins=HISTOGRAM)
        curves = self._summary.Summary()
        for expert, share in enumerate(load):
            curves.MergeFrom(self._summary.scalar(f"{key}/expert{expert}", share))
        return curves

    def image(self, key: str, pixels: np.ndarray, step: int) -> None:
        self._add(step=step, summary=self._summary.image(key, pixels, dataformats="HWC"))

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        self._file.close()


class MetricLog:
    """``metrics.jsonl`` and TensorBoard events of a run; only rank 0 makes one.

    Args:
        folder: the run directory. resume_step: records after that step are of a life that the
            resume takes back, and are cut off.
    """

    def __init__(self, folder: Path, tensorboard: bool, resume_step: int | None) -> None:
        self.path = folder / "metrics.jsonl"
        try:
            self._take_back(resume_step)
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): it keeps records after step %s, which come again",
                plain(self.path), error.strerror, resume_step or 0,
            )  # fmt: skip
        self._file = Appender(self.path)
        self._step = resume_step or 0
        self._loads: list[list[float]] = []  # of the layers, as last written
        purge = None if resume_step is None else resume_step + 1
        self._events = Events(folder / "tensorboard", purge) if tensorboard else None

    def _take_back(self, resume_step: int | None) -> None:
        """Leave nothing but whole records of up to ``resume_step``."""
        kept = []
        if resume_step is not None:
            kept = [r for r in read_metrics(self.path.parent) if r["step"] <= resume_step]
        text = b"".join(map(_line, kept))
        if self.path.is_file() and (there := self.path.read_bytes()).startswith(text):
            if there != text:
                os.truncate(self.path, len(text))  # needs no room on the disk
            return
        if not self.path.exists():
            with contextlib.suppress(OSError):  # the first record reports it
                self.path.touch()
            return
        temporary = self.path.with_suffix(".tmp")  # a kill here must not lose what there is
        temporary.unlink(missing_ok=True)
        temporary.write_bytes(text)
        temporary.replace(self.path)

    def write(self, record: Record) -> None:
        """Append one record with keys ``step`` and ``epoch``."""
        self._step = record["step"]
        self._file.write(_line(record))
        loads = [value for key, value in record.items() if key.endswith("/load")]
        self._loads = loads or self._loads
        if self._events:
            self._events.add(record, self._loads)

    def image(self, key: str, path: Path) -> None:
        """Show a PNG at the step of the last record."""
        if self._events:
            with Image.open(path) as image:
                self._events.image(key, np.asarray(image.convert("RGB")), self._step)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def _line(record: Record) -> bytes:
    """A record as strict JSON, which knows no NaN and no infinity: they are null."""
    strict = _replaced(record, lambda x: isinstance(x, float) and not math.isfinite(x), None)
    return f"{json.dumps(strict, allow_nan=False)}\n".encode()


def _replaced(value: Any, wrong: Callable[[Any], bool], right: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(one, wrong, right) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, wrong, right) for one in value]
    return right if wrong(value) else value


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
    """The records of a run, with NaN for null; a line that is no whole record is left out."""
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
            records.append(_replaced(record, lambda x: x is None, math.nan))
    return records


def progress_bar(enabled: bool) -> Progress:
    """Bar with loss, rate, gradient norm, images/s and time to go; none if nobody watches."""
    console = Terminal()
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.live),
        transient=True,
    )
