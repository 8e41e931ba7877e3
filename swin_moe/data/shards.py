"""Random access to tar shards of webdataset's layout: ``key.png`` beside ``key.cls``."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import glob
from typing import IO, Any

import numpy as np
from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})
SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_COMPRESSED = 256 << 20  # bytes of .gz shards in one set, which are kept in memory
MAX_UNPACKED = 1 << 30  # bytes of one .gz shard
MAX_OPEN = 256  # a set may have more shards than a process may open files
INDEX_THREADS = 16  # on a network file system, reading the headers waits for latency


def find_shards(pattern: str) -> list[str]:
    """Paths of local shards, sorted by name.

    Args:
        pattern: with ``{``, ``*``, ``?`` or ``[``: brace ranges and wildcards
            (``train-{000..127}.tar``); otherwise what comes before ``-*.tar``, ``-*.tar.gz`` or
            ``-*.tgz``. Every path of a brace range must exist.

    Raises:
        ValueError: a brace range names a file that does not exist.
    """
    if not has_wildcard(pattern):
        return sorted(p for suffix in SUFFIXES for p in glob(f"{pattern}-*{suffix}"))
    paths: list[str] = []
    for part in braceexpand(pattern):
        if "*" in part or "?" in part or "[" in part:
            paths += sorted(p for p in glob(part) if p.endswith(SUFFIXES))
        elif os.path.isfile(part):
            paths.append(part)
        else:
            raise ValueError(f"{part}: no such shard, but {pattern} names it")
    return paths


def has_wildcard(pattern: str) -> bool:
    """Whether ``pattern`` is a brace range or has wildcards."""
    return any(character in pattern for character in "{*?[")


@dataclass
class _Index:
    """Where the samples of one shard lie. Typed arrays: a million Python tuples are 100 MB."""

    labels: array = field(default_factory=lambda: array("q"))
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    keys: list[bytes] = field(default_factory=list)
    content: bytes | None = None  # the whole archive, if it was compressed


class ShardSource:
    """Random access to the samples of tar shards.

    A plain ``.tar`` is read in place at the offsets of its members; a compressed one is unpacked
    to memory once, before worker processes start, which then share it.

    Args:
        paths: shards, as from :func:`find_shards`.
        num_classes: labels must lie in [0, num_classes); 0 allows any that is not negative.

    Raises:
        ValueError: one line naming the shard, if one is truncated or damaged, a sample lacks its
            image or label, a label is not an integer in range, or too much is compressed.
    """

    def __init__(self, paths: Sequence[str], num_classes: int) -> None:
        self.paths = [str(path) for path in paths]
        _check_compressed(self.paths)
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            parts = list(pool.map(lambda path: _index_shard(path, num_classes), self.paths))
        self.labels = _join((part.labels for part in parts), np.int64)
        self._offsets = _join((part.offsets for part in parts), np.int64)
        self._sizes = _join((part.sizes for part in parts), np.int64)
        self.runs = np.array([len(part.labels) for part in parts], np.int64)
        self._shards = np.repeat(np.arange(len(parts)), self.runs)
        self._keys = np.array([key for part in parts for key in part.keys], dtype=np.bytes_)
        self._contents = [part.content for part in parts]
        self._files: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not survive pickling

    def describe(self) -> str:
        """Format and size, for the log."""
        size = self._sizes.sum() / 1e6
        return f"tar shards ({len(self.paths)} files, {size:,.1f} MB of images)"

    def key(self, index: int) -> str:
        """Name of a sample: its shard's path and its key."""
        return f"{self.paths[self._shards[index]]}:{self._keys[index].decode()}"

    def read(self, index: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            OSError: the shard cannot be read, or is shorter than when it was indexed.
        """
        shard, offset, size = self._shards[index], self._offsets[index], self._sizes[index]
        content = self._contents[shard]
        if content is not None:
            return content[offset : offset + size]
        # pread leaves the file position alone, so that forked workers may share an open file.
        data = os.pread(self._file(int(shard)).fileno(), int(size), int(offset))
        if len(data) < size:
            raise OSError("the shard became shorter while it was in use")
        return data

    def _file(self, shard: int) -> IO[bytes]:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115
        return self._files[shard]


def _join(parts: Iterable[array], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _is_compressed(path: str) -> bool:
    return path.endswith("gz")


def _check_compressed(paths: list[str]) -> None:
    packed = [path for path in paths if _is_compressed(path)]
    size = sum(os.path.getsize(path) for path in packed)
    if size > MAX_COMPRESSED:
        raise ValueError(
            f"{packed[0]}: the compressed shards hold {size >> 20} MiB, more than the "
            f"{MAX_COMPRESSED >> 20} MiB that are kept in memory: gunzip them to plain .tar"
        )


def _index_shard(path: str, num_classes: int) -> _Index:
    index = _Index()
    try:
        if _is_compressed(path):
            with gzip.open(path) as packed:
                index.content = packed.read(MAX_UNPACKED + 1)
            if len(index.content) > MAX_UNPACKED:
                raise tarfile.ReadError(f"more than {MAX_UNPACKED >> 20} MiB when unpacked")
            stream: IO[bytes] = io.BytesIO(index.content)
        else:
            stream = open(path, "rb")  # noqa: SIM115 - closed below
        with stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            tar.getmembers()  # reads all headers
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # tarfile takes this for a quiet end; it is a lost tail or a damaged header.
                raise tarfile.ReadError("no end-of-archive block")
            _index_members(path, tar, index, num_classes)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(
            f"{path}: the shard is truncated or damaged ({error}): copy or write it again"
        ) from None
    return index


def _index_members(path: str, tar: tarfile.TarFile, index: _Index, num_classes: int) -> None:
    """Gather neighbouring members of one key, as webdataset does; other extensions are ignored."""
    current: str | None = None
    image: tarfile.TarInfo | None = None
    label: int | None = None

    def finish() -> None:
        if current is None:
            return
        if image is None or label is None:
            lack = (
                "label (.cls)"
                if label is None
                else f"image ({', '.join(sorted(IMAGE_EXTENSIONS))})"
            )
            raise ValueError(f"{path}: sample '{current}' has no {lack}")
        index.keys.append(current.encode())
        index.labels.append(label)
        index.offsets.append(image.offset_data)
        index.sizes.append(image.size)

    for member in tar:
        key, extension = base_plus_ext(member.name)
        extension = extension.lower() if extension else ""
        if not member.isfile() or (extension != "cls" and extension not in IMAGE_EXTENSIONS):
            continue
        if key != current:
            finish()
            current, image, label = key, None, None
        if extension == "cls":
            content = tar.extractfile(member)
            assert content is not None  # it is a file
            label = _parse_label(path, key, content.read(), num_classes)
        else:
            image = member
    finish()


def _parse_label(path: str, key: str, text: bytes, num_classes: int) -> int:
    try:
        label = int(text)
    except ValueError:
        raise ValueError(
            f"{path}: the label of sample '{key}' is {text[:20]!r}, not an integer"
        ) from None
    if label < 0 or (num_classes and label >= num_classes):
        raise ValueError(
            f"{path}: the label of sample '{key}' is {label}, not in [0, {num_classes or '…'}): "
            "mend the shard or model.num_classes"
        )
    return label
