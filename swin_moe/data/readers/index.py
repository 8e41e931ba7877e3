"""The index of tar shards: a manifest of the shards, and a memory-mapped table of their samples.

Both are written once. Every process of a node maps the same table, so that a start with 14 million
samples takes neither time nor memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from ...common.reading import read_json
from ...common.text import plain, reason
from ...common.writing import replacing

log = logging.getLogger(__name__)

RECORD = np.dtype(
    [
        ("label", "<i4"),
        ("shard", "<u4"),  # place in the manifest
        ("offset", "<u8"),  # of the image in the shard, in bytes
        ("size", "<u4"),  # of the image, in bytes
        ("header", "<u4"),  # bytes from the start of the member to the image
    ]
)
MAX_CLASSES = 1 << 24  # a larger number is some other id, not a class
RULE = "3"  # the version of the scan; indexes of other versions are not used
CACHES = (".swin_moe_index", "~/.cache/swin_moe/index")  # first in the shards' folder


class Shard(BaseModel):
    """One tar file; ``sha256`` is empty where it was not written by ``prepare-data``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[^/\\]+$")]  # of a file in the manifest's folder
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str = ""
    mtime_ns: NonNegativeInt = 0  # of shards of other programs, which may be written again


class DatasetManifest(BaseModel):
    """``SPLIT.json``: the shards of a split in its folder, and the samples of each class.

    ``preparation`` has the settings that wrote the shards; empty for shards of other programs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    shards: list[Shard]
    class_counts: list[NonNegativeInt]
    preparation: dict[str, str | int | float | None] = {}

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def table_path(manifest: Path) -> Path:
    """Return the path of a manifest's table."""
    return manifest.with_name(manifest.name.removesuffix(".json") + ".index.npy")


def is_manifest(path: Path) -> bool:
    """Return whether a ``.json`` is a manifest: other data sets have a ``train.json`` too."""
    with path.open("rb") as file:
        return table_path(path).is_file() or b'"shards"' in file.read(4096)


def read_index(path: Path) -> tuple[DatasetManifest, np.ndarray]:
    """Read a manifest, and map its table of ``RECORD`` [N].

    Raises:
        ValueError: one is missing, damaged or of another version, or they do not belong together;
            one line naming the file.
    """
    try:
        manifest = DatasetManifest.model_validate_json(path.read_bytes())
        table = np.load(table_path(path), mmap_mode="r", allow_pickle=False)
    except PermissionError:
        raise
    except (OSError, EOFError, ValueError) as error:  # pydantic's is a ValueError of many lines
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else reason(error)
        raise ValueError(
            f"{plain(path)}: the index is damaged or incomplete ({why}): remove "
            f"{plain(path.name)} to have the shards indexed again"
        ) from None
    if manifest.version != 1 or table.dtype != RECORD or len(table) != manifest.num_samples:
        raise ValueError(
            f"{path}: {table_path(path).name} is not its table: remove {path.name} to have the "
            "shards indexed again"
        )
    return manifest, table


def write_index(path: Path, manifest: DatasetManifest, tables: Iterable[np.ndarray]) -> None:
    """Write the shards' tables as one, then the manifest; replace each file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(table_path(path)) as temporary:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, RECORD))
        header["shape"] = (manifest.num_samples,)
        # A memory mapping would kill the process on a full disk.
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for table in tables:
                file.write(table.tobytes())
    with replacing(path) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def check_sizes(path: Path, manifest: DatasetManifest, paths: Sequence[Path]) -> None:
    """Compare the shards' sizes with their manifest.

    Raises:
        ValueError: a shard is missing or of another size; one line naming it.
    """
    for shard, file in zip(manifest.shards, paths, strict=True):
        try:
            size = file.stat().st_size
        except OSError as error:
            raise ValueError(
                f"{file}: {error.strerror}, but {path} lists the shard: copy it again"
            ) from None
        if size != shard.bytes:
            raise ValueError(
                f"{file}: the shard has {size:,} bytes, but {path} says {shard.bytes:,}: copy it "
                f"again, or remove {path.name} if the shard was changed on purpose"
            )


def cache_path(paths: Sequence[Path], kind: str, folder: str) -> Path:
    """Return the path of these shards' index in a folder of ``CACHES``."""
    names = "\n".join([RULE, kind, *(str(path.resolve()) for path in paths)])
    root = paths[0].parent / os.path.expanduser(folder)
    return root / f"{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}.json"


def _cache_paths(paths: Sequence[Path], kind: str) -> list[Path]:
    """Return the paths of these shards' index, without the home folder's for users without one."""
    named = [folder for folder in CACHES if not os.path.expanduser(folder).startswith("~")]
    return [cache_path(paths, kind, folder) for folder in named]


def read_cache(paths: Sequence[Path], kind: str) -> tuple[DatasetManifest, np.ndarray] | None:
    """Read the cached index of these shards, None if there is none or they have changed."""
    for path in _cache_paths(paths, kind):
        if not os.path.isfile(path):
            continue
        try:
            manifest, table = read_index(path)
        except (PermissionError, ValueError):  # it will be written again
            continue
        stats = [file.stat() for file in paths]
        if [(s.st_size, s.st_mtime_ns) for s in stats] == [
            (shard.bytes, shard.mtime_ns) for shard in manifest.shards
        ]:
            return manifest, table
    return None


def write_cache(
    paths: Sequence[Path], kind: str, manifest: DatasetManifest, table: np.ndarray
) -> None:
    """Write the index next to the shards, or to the user's cache if that folder is read-only."""
    for path in _cache_paths(paths, kind):
        try:
            write_index(path, manifest, [table])
        except OSError as error:
            log.info("no index in %s: %s", path.parent, error)
        else:
            log.info("the shards' index is kept in %s", path)
            return


@contextmanager
def one_at_a_time(paths: Sequence[Path], kind: str) -> Iterator[None]:
    """Let one process at a time make the index of these shards; the others wait."""
    for path in _cache_paths(paths, kind):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.with_suffix(".lock").open("w")
        except OSError:
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: every process makes the index
                log.info("no locks in %s", path.parent)
            yield
            return
    yield


def read_timm_info(path: Path, split: str) -> list[str] | None:
    """Read the file names of a split in timm's ``_info.json``; None if it lacks the split.

    Raises:
        ValueError: the file has another content.
    """
    try:
        splits = read_json(path)["splits"]
        found = splits.get(split)
        names = None if found is None else [str(name) for name in found["filenames"]]
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names or ()):
            raise ValueError
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: not an index of splits with their filenames in this folder: mend it"
        ) from None
