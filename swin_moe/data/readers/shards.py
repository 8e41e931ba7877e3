"""Random access to tar shards in webdataset's layout: ``key.jpg`` with ``key.cls``."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import escape, glob
from pathlib import Path
from typing import IO, Any

import numpy as np
from braceexpand import braceexpand
from rich.filesize import decimal
from rich.progress import track

from ...common.terminal import Terminal
from ...common.text import plain
from ..files import Bounded
from .index import (
    DatasetManifest,
    Shard,
    check_sizes,
    one_at_a_time,
    read_cache,
    read_index,
    write_cache,
)
from .scan import Scan, is_compressed, sample_key, scan_shard

PER_CLASS = "a tar per class"
PASSED_OVER = "passed_over"  # key of the cached index
SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_COMPRESSED = 256 << 20  # bytes of a set's .gz shards, which are kept in memory
MAX_OPEN = 256  # files: a set may have more shards than a process may open
INDEX_THREADS = 16  # reading headers from a network file system waits for its latency
INDEXED_BYTES = 16 << 20  # of the smallest set whose index is kept


def find_shards(pattern: str) -> list[Path]:
    """Return the paths of local shards, sorted by name.

    Args:
        pattern: with ``{``, ``*``, ``?`` or ``[``: brace ranges and wildcards
            (``train-{000..127}.tar``); otherwise the text before ``-*.tar``, ``-*.tar.gz`` or
            ``-*.tgz``. Every path of a brace range must exist. The part of the path that exists is
            never taken as a pattern.

    Raises:
        ValueError: a brace range names a file that does not exist.
    """
    folder, rest = literal_part(pattern)
    ends = [f"{escape(rest)}-*{suffix}" for suffix in SUFFIXES]
    found = sorted(folder / path for end in ends for path in glob(end, root_dir=folder))
    if found or not has_wildcard(rest):
        return found
    try:
        parts = list(braceexpand(rest)) if "{" in rest else [rest]
    except ValueError as error:
        raise ValueError(f"{plain(pattern)} is not a pattern of shards: {error}") from None
    paths: list[str] = []
    for part in parts:
        if has_wildcard(part.replace("{", "")):
            paths += sorted(p for p in glob(part, root_dir=folder) if p.endswith(SUFFIXES))
        elif (folder / part).is_file():
            paths.append(part)
        else:
            raise ValueError(
                f"{plain(folder / part)}: no such shard, but {plain(pattern)} names it"
            )
    return [folder / path for path in paths]


def find_parquets(pattern: str) -> list[Path]:
    """Return the paths of parquet files by a pattern, or by the text before ``-*.parquet``."""
    folder, rest = literal_part(pattern)
    found = glob(f"{escape(rest)}-*.parquet", root_dir=folder)
    if not found and has_wildcard(rest):
        found = [path for path in glob(rest, root_dir=folder) if path.endswith(".parquet")]
    return [folder / path for path in sorted(found)]


def class_of(shard: Path) -> str:
    """Return the class of a tar per class: its name without the suffix."""
    suffix = next(end for end in SUFFIXES if shard.name.endswith(end))
    return shard.name.removesuffix(suffix)


def literal_part(pattern: str) -> tuple[Path, str]:
    """Return the leading folders of the pattern that exist, and the rest of it."""
    folder = Path(pattern)
    parts: list[str] = []
    while folder.name and (not parts or not folder.is_dir()):
        parts.append(folder.name)
        folder = folder.parent
    return folder, "/".join(reversed(parts))


def has_wildcard(pattern: str) -> bool:
    """Return whether ``pattern`` has a brace range or wildcards."""
    return any(character in pattern for character in "{*?[")


def is_pattern(path: str) -> bool:
    """Return whether the part of the path that does not exist is a pattern."""
    return not os.path.exists(path) and has_wildcard(literal_part(path)[1])


class ShardSource(Bounded):
    """Random access to the samples of tar shards; see :class:`~.source.Source`.

    A plain ``.tar`` is read in place at the offsets of its members. A compressed one is unpacked to
    memory once, before the worker processes start, which share it.

    Args:
        paths: the shards of ``manifest``.
        table: ``RECORD`` [N].
        contents: of compressed shards, by number.
        kind: for the log.

    Attributes:
        open_files: at most ``MAX_OPEN``, by number of the shard.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        manifest: DatasetManifest,
        table: np.ndarray,
        class_names: list[str] | None,
        contents: dict[int, bytes],
        kind: str = "tar shards",
    ) -> None:
        self.paths, self.class_names = list(paths), class_names
        self.class_counts = np.array(manifest.class_counts, np.int64)
        self.runs = np.array([shard.samples for shard in manifest.shards], np.int64)
        self._bytes = sum(shard.bytes for shard in manifest.shards)
        self.table, self._contents, self._kind = table, contents, kind
        self.numbered = kind != PER_CLASS
        self.open_files: dict[int, IO[bytes]] = {}
        self.manifest: Path | None = None  # the path of `prepare-data`'s manifest
        passed = int(manifest.preparation.get(PASSED_OVER) or 0)
        if self.numbered:
            note = f"{passed:,} images passed over: no .cls has the same key"
        else:
            note = f"{passed:,} files in the tars passed over: they are not named like images"
        self.passed_over = note if passed else ""

    @property
    def labels(self) -> np.ndarray:
        return self.table["label"]

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "open_files": {}}  # open files do not survive pickling
        if isinstance(self.table, np.memmap):  # would be pickled as a copy
            state["table"] = Path(str(self.table.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["table"], Path):
            state["table"] = np.load(state["table"], mmap_mode="r", allow_pickle=False)
        self.__dict__.update(state)

    def describe(self) -> str:
        return f"{self._kind} ({len(self.paths):,} files, {decimal(self._bytes)})"

    def key(self, index: int) -> str:
        record = self.table[index]
        shard, offset = int(record["shard"]), int(record["offset"])
        path, start = self.paths[shard], offset - int(record["header"])
        try:
            headers = self._bytes_at(shard, start, offset - start)
            # One block, after those of a name of more than 100 bytes.
            with tarfile.open(fileobj=io.BytesIO(headers + bytes(1024)), mode="r:") as tar:
                member = tar.next()
        except (OSError, tarfile.TarError):
            member = None
        return f"{path}:{sample_key(member)[0] if member else f'at byte {start}'}"

    def read(self, index: int) -> bytes:
        record = self.table[index]
        size = self.checked_size(int(record["size"]))
        return self._bytes_at(int(record["shard"]), int(record["offset"]), size)

    def _bytes_at(self, shard: int, offset: int, size: int) -> bytes:
        content = self._contents.get(shard)
        if content is not None:
            return content[offset : offset + size]
        # pread does not move the file position: forked workers may share the open file.
        data = os.pread(self._file(shard).fileno(), size, offset)
        if len(data) < size:
            raise OSError("the shard became shorter while it was in use")
        return data

    def _file(self, shard: int) -> IO[bytes]:
        if shard not in self.open_files:
            if len(self.open_files) >= MAX_OPEN:
                self.open_files.pop(next(iter(self.open_files))).close()
            self.open_files[shard] = self.paths[shard].open("rb", buffering=0)
        return self.open_files[shard]


def open_manifest(path: Path, class_names: list[str] | None) -> ShardSource:
    """Open shards that ``prepare-data`` wrote, by their ``SPLIT.json``.

    Raises:
        ValueError: index and shards do not belong together; one line.
    """
    manifest, table = read_index(path)
    paths = [path.parent / shard.name for shard in manifest.shards]
    check_sizes(path, manifest, paths)
    source = ShardSource(paths, manifest, table, class_names, {})
    source.manifest = path
    return source


def open_shards(
    paths: Sequence[Path], class_names: list[str] | None, labels: Sequence[int] | None = None
) -> ShardSource:
    """Open any tar shards; index them at the first time, and keep the index.

    Args:
        labels: of each shard, if each is one class.

    Raises:
        ValueError: see :func:`.scan.scan_shard`; or the compressed shards are too large.
    """
    kind = "tar shards" if labels is None else PER_CLASS
    _check_doubles(paths)
    packed = [path for path in paths if is_compressed(path)]
    _check_compressed(packed)
    if packed or sum(path.stat().st_size for path in paths) < INDEXED_BYTES:
        return _scanned(paths, class_names, labels, kind, keep=False)
    if kept := read_cache(paths, kind):
        return ShardSource(paths, *kept, class_names, {}, kind)
    with one_at_a_time(paths, kind):
        if kept := read_cache(paths, kind):  # written by another process meanwhile
            return ShardSource(paths, *kept, class_names, {}, kind)
        return _scanned(paths, class_names, labels, kind, keep=True)


def _scanned(
    paths: Sequence[Path],
    class_names: list[str] | None,
    labels: Sequence[int] | None,
    kind: str,
    keep: bool,
) -> ShardSource:
    stats = [path.stat() for path in paths]
    numbers = range(len(paths))
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        found = pool.map(scan_shard, paths, numbers, labels or [None] * len(paths))
        console = Terminal(stderr=True)
        quiet = not console.live or len(paths) < INDEX_THREADS
        scans: list[Scan] = list(
            track(found, "indexing shards", len(paths), console=console, disable=quiet)
        )
    table = np.concatenate([scan.table for scan in scans])
    manifest = DatasetManifest(
        shards=[
            Shard(
                name=plain(path.name).replace("\\", "_"),
                samples=len(scan.table),
                bytes=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
            )
            for path, scan, stat in zip(paths, scans, stats, strict=True)
        ],
        class_counts=np.bincount(table["label"]).tolist(),
        preparation={PASSED_OVER: sum(scan.passed_over for scan in scans)},
    )
    if keep:
        write_cache(paths, kind, manifest, table)
        if kept := read_cache(paths, kind):  # mapped, and shared with the other processes
            return ShardSource(paths, *kept, class_names, {}, kind)
    contents = {n: scan.content for n, scan in enumerate(scans) if scan.content is not None}
    return ShardSource(paths, manifest, table, class_names, contents, kind)


def _check_doubles(paths: Sequence[Path]) -> None:
    """Raise ``ValueError`` if a shard is next to its compressed copy."""
    seen: dict[Path, Path] = {}
    for path in paths:
        if (other := seen.setdefault(path.with_name(class_of(path)), path)) != path:
            raise ValueError(
                f"{plain(other)} and {plain(path.name)} are one shard twice: remove one of them"
            )


def _check_compressed(packed: list[Path]) -> None:
    size = sum(path.stat().st_size for path in packed)
    if size > MAX_COMPRESSED:
        raise ValueError(
            f"{packed[0]}: the compressed shards hold {size >> 20} MiB, more than the "
            f"{MAX_COMPRESSED >> 20} MiB that are kept in memory: gunzip them to plain .tar"
        )
