"""Parquet shards of images in Hugging Face's layout (``imagenet-1k``)."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.filesize import decimal

from ...common.reading import parse_json
from ...common.text import plain, reason
from ..files import Bounded
from .index import MAX_CLASSES

KEPT_BYTES = 256 << 20  # of row groups in memory
MAX_OPEN = 64
THREADS = 8
IMAGES, LABELS = ("image", "img", "jpg"), ("label", "labels", "fine_label", "cls")


class ParquetSource(Bounded):
    """Samples of parquet shards; see :class:`~.source.Source`.

    A read loads its whole row group, and the last few groups are kept: shuffle in a window
    (``data.shuffle_window``), or rewrite the set with ``swin-moe prepare-data``.

    Args:
        paths: shards with a column of images (bytes, or a struct with ``bytes``) and of labels.

    Attributes:
        row_groups: the last ones read, at most ``KEPT_BYTES``, by number.
        open_files: at most ``MAX_OPEN``, by number of the shard.

    Raises:
        ValueError: pyarrow, columns or labels are missing, or the file is damaged; one line naming
            the shard.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        with ThreadPoolExecutor(THREADS) as pool:
            shards = list(pool.map(_look, self.paths))
        self._images = [shard.image for shard in shards]
        self.class_names = self._agreed_names([shard.class_names for shard in shards])
        self._groups = [
            (number, group) for number, s in enumerate(shards) for group in range(len(s.runs))
        ]
        self.labels = np.concatenate([np.empty(0, np.int32), *(s.labels for s in shards)])
        self.runs = np.array([run for shard in shards for run in shard.runs], np.int64)
        self.class_counts = np.bincount(self.labels)
        self._ends = np.cumsum(self.runs)
        self.passed_over = ""
        self._bytes = sum(path.stat().st_size for path in self.paths)
        self.row_groups: OrderedDict[int, list[bytes | None]] = OrderedDict()
        self.open_files: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()

    def _agreed_names(self, names: list[list[str] | None]) -> list[str] | None:
        named = [place for place, found in enumerate(names) if found]
        for place in named[1:]:
            if names[place] != names[named[0]]:
                raise ValueError(
                    f"{plain(self.paths[place])} names its classes differently from "
                    f"{plain(self.paths[named[0]].name)}: give shards of one data set"
                )
        return names[named[0]] if named else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open_files": OrderedDict(), "row_groups": OrderedDict()}

    def describe(self) -> str:
        return (
            f"parquet ({len(self.paths):,} files, {decimal(self._bytes)}; read by row groups: "
            "swin-moe prepare-data makes faster shards of it)"
        )

    def key(self, index: int) -> str:
        shard, within = self._groups[group := int(np.searchsorted(self._ends, index, "right"))]
        first = group - within
        return f"{self.paths[shard]}:{index - int(self._ends[first] - self.runs[first])}"

    def read(self, index: int) -> bytes:
        group = int(np.searchsorted(self._ends, index, "right"))
        row = index - int(self._ends[group] - self.runs[group])
        data = self._row_group(group)[row]
        if data is None:
            raise ValueError("the row has no image")
        self.checked_size(len(data))
        return data

    def _row_group(self, group: int) -> list[bytes | None]:
        if self._process != os.getpid():  # forked: open files may not be shared
            self.open_files, self._process = OrderedDict(), os.getpid()
        if group in self.row_groups:
            self.row_groups.move_to_end(group)
            return self.row_groups[group]
        shard, within = self._groups[group]
        if shard not in self.open_files:
            if len(self.open_files) >= MAX_OPEN:
                self.open_files.popitem(last=False)[1].close()
            self.open_files[shard] = _open(self.paths[shard])
        with _naming(self.paths[shard]):
            table = self.open_files[shard].read_row_group(within, columns=[self._images[shard]])
            values = table.column(0).to_pylist()
        images = [value.get("bytes") if isinstance(value, dict) else value for value in values]
        self.row_groups[group] = images
        while len(self.row_groups) > 1 and sum(map(_size, self.row_groups.values())) > KEPT_BYTES:
            self.row_groups.popitem(last=False)
        return images


def _size(images: list[bytes | None]) -> int:
    return sum(len(image) for image in images if image is not None)


class _Shard(NamedTuple):
    """The parts of a shard that are read when the set is opened."""

    image: str  # its column of images
    labels: np.ndarray
    runs: list[int]
    class_names: list[str] | None


def _look(path: Path) -> _Shard:
    with _open(path) as file:
        import pyarrow.types

        image, label = (_column(path, file, names) for names in (IMAGES, LABELS))
        kind = file.schema_arrow.field(image).type
        if pyarrow.types.is_struct(kind) and "bytes" in {f.name for f in kind.fields}:
            kind = kind.field("bytes").type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) not in ("binary", "large_binary", "binary_view"):
            raise ValueError(f"{path}: the column '{image}' holds {kind}, not encoded images")
        with _naming(path):
            column = file.read(columns=[label]).column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
        if not pyarrow.types.is_integer(column.type):
            raise ValueError(
                f"{path}: the column '{label}' holds {column.type}, not class numbers: write "
                "numbers from 0 on"
            )
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"{path}: row {row} has no label")
        labels = column.to_numpy()
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= MAX_CLASSES))):
            raise ValueError(
                f"{path}: row {wrong[0]} has the label {labels[wrong[0]]}: a split without labels "
                "cannot be used"
            )
        runs = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return _Shard(image, labels.astype(np.int32), runs, _class_names(file, label))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors into one line that names the shard."""
    import pyarrow

    try:
        yield
    except PermissionError:  # pyarrow's own names no file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from None
    except (OSError, pyarrow.ArrowException) as error:
        text = f"{plain(path)}: the shard is damaged ({reason(error)}): copy it again"
        raise ValueError(text) from None


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow: pip install 'swin_moe[parquet]'"
        ) from None
    with _naming(path):
        # pyarrow accepts only names in UTF-8.
        return pyarrow.parquet.ParquetFile(path if plain(path) == str(path) else path.open("rb"))


def _column(path: Path, file: Any, names: Sequence[str]) -> str:
    present = file.schema_arrow.names
    for name in names:
        if name in present:
            return name
    raise ValueError(f"{path}: no column {' or '.join(names)}: it has {', '.join(present)}")


def _class_names(file: Any, label: str) -> list[str] | None:
    """Return the names that Hugging Face's ``ClassLabel`` stores in the schema."""
    metadata = file.schema_arrow.metadata or {}
    try:
        features = parse_json(metadata[b"huggingface"].decode(), "features")["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None
