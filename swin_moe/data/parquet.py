"""Parquet shards as Hugging Face writes image data sets (``imagenet-1k``)."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

KEPT_BYTES = 256 << 20  # of row groups
IMAGES, LABELS = ("image", "img", "jpg"), ("label", "labels", "fine_label", "cls")


class ParquetSource:
    """Samples of parquet shards; see :class:`~.source.Source`.

    A read takes its whole row group, of which the last few are kept: shuffle in a window
    (``data.shuffle_window``), or pack the set anew with ``swin-moe prepare-data``.

    Args:
        paths: shards with a column of images (bytes, or a struct with ``bytes``) and of labels.

    Raises:
        ValueError: one line naming the shard, if pyarrow is missing, the file is damaged, or
            columns or labels are missing.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self.class_names: list[str] | None = None
        labels, runs = [], []
        for path in self.paths:
            file = _open(path)
            image, label = (_column(path, file, names) for names in (IMAGES, LABELS))
            self.class_names = self.class_names or _class_names(file, label)
            column = file.read(columns=[label]).column(0)
            if column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise ValueError(f"{path}: row {row} has no label")
            labels.append(column.to_numpy().astype(np.int32))
            runs += [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self._image = image
            file.close()
        self._groups = [
            (shard, group)
            for shard, path in enumerate(self.paths)
            for group in range(_open(path).num_row_groups)
        ]
        self.labels = np.concatenate(labels) if labels else np.empty(0, np.int32)
        self.runs = np.array(runs, np.int64)
        self._ends = np.cumsum(self.runs)
        if len(self.labels) and self.labels.min() < 0:
            raise ValueError(
                f"{self.key(int(np.argmin(self.labels)))} has the label {self.labels.min()}: a "
                "split without labels cannot be used"
            )
        self.class_counts = np.bincount(self.labels)
        self._bytes = sum(path.stat().st_size for path in self.paths)
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()
        self._files: dict[int, Any] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_kept": OrderedDict()}

    def describe(self) -> str:
        """Format and size, for the log."""
        return (
            f"parquet ({len(self.paths):,} files, {decimal(self._bytes)}; read by row groups: "
            "swin-moe prepare-data makes faster shards of it)"
        )

    def key(self, index: int) -> str:
        """Name of a sample: its shard and its row there."""
        shard, within = self._groups[group := int(np.searchsorted(self._ends, index, "right"))]
        first = group - within
        return f"{self.paths[shard]}:{index - int(self._ends[first] - self.runs[first])}"

    def read(self, index: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            OSError, ValueError: the shard cannot be read, or has no image there.
        """
        group = int(np.searchsorted(self._ends, index, "right"))
        row = index - int(self._ends[group] - self.runs[group])
        data = self._row_group(group)[row]
        if data is None:
            raise ValueError("the row has no image")
        return data

    def _row_group(self, group: int) -> list[bytes | None]:
        if self._process != os.getpid():  # forked: open files may not be shared
            self._files, self._process = {}, os.getpid()
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        shard, within = self._groups[group]
        if shard not in self._files:
            self._files[shard] = _open(self.paths[shard])
        column = self._files[shard].read_row_group(within, columns=[self._image]).column(0)
        images = [
            value.get("bytes") if isinstance(value, dict) else value for value in column.to_pylist()
        ]
        self._kept[group] = images
        while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return images


def _size(images: list[bytes | None]) -> int:
    return sum(len(image) for image in images if image is not None)


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow: pip install 'swin_moe[parquet]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: the shard is damaged ({reason}): copy it again") from None


def _column(path: Path, file: Any, names: Sequence[str]) -> str:
    there = file.schema_arrow.names
    for name in names:
        if name in there:
            return name
    raise ValueError(f"{path}: no column {' or '.join(names)}: it has {', '.join(there)}")


def _class_names(file: Any, label: str) -> list[str] | None:
    """Names that Hugging Face's ``ClassLabel`` keeps in the schema."""
    metadata = file.schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None
