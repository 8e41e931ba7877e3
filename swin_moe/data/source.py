"""From ``data.path`` and a split's name to the samples themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from ..config import DataConfig
from .folder import FolderSource, class_folders
from .shards import ShardSource, find_shards, has_wildcard

BUNDLED = {"fashion_mnist": Path(__file__).parent / "fashion_mnist"}


class Source(Protocol):
    """Random access to encoded images and their labels [N] int64.

    ``runs`` are the lengths of the parts that lie together in storage, int64.
    """

    labels: np.ndarray
    runs: np.ndarray

    def __len__(self) -> int: ...
    def describe(self) -> str: ...
    def key(self, index: int) -> str: ...
    def read(self, index: int) -> bytes: ...


def open_source(
    data: DataConfig, num_classes: int, training: bool
) -> tuple[Source, list[str] | None]:
    """Open one split: a folder of class folders, or tar shards.

    Returns:
        The samples, and the names of the classes where known: the class folders', or the lines of
        ``classes.txt`` beside shards.

    Raises:
        ValueError: one line naming the path and the key to mend, if nothing is there, it holds no
            sample, the splits differ in classes, or there are more classes than the model has.
    """
    path = Path(data.path).expanduser()
    if data.path in BUNDLED and not path.exists():
        path = BUNDLED[data.path]
    if not path.is_dir() and not has_wildcard(str(path)):
        raise ValueError(
            f"data.path={data.path}: no such folder: give a folder of images, a folder of tar "
            f"shards, or the name of a bundled sample ({', '.join(BUNDLED)})"
        )
    name, split = ("data.train", data.train) if training else ("data.val", data.val)
    where = path / split
    source: Source
    names: list[str] | None
    if where.is_dir():
        other = None if training else path / data.train
        source, names = _open_folder(where, name, num_classes, other)
    else:
        try:
            source, names = _open_shards(where, num_classes), _read_names(path / "classes.txt")
            if names and len(source) and source.labels.max() >= len(names):
                raise ValueError(
                    f"{path / 'classes.txt'} has {len(names)} names, but a label is "
                    f"{source.labels.max()}: give every class a line, or remove the file"
                )
        except ValueError as error:
            raise ValueError(f"{name}={split}: {error}") from None
    if not len(source):
        raise ValueError(f"{name}={split}: {where} holds no images")
    return source, names


def _open_shards(where: Path, num_classes: int) -> ShardSource:
    paths = find_shards(str(where))
    if not paths:
        kinds = "" if has_wildcard(str(where)) else f", and no shards {where}-*.tar (.tar.gz, .tgz)"
        raise ValueError(f"found no {where}{kinds}: set it to a sub-folder or to shards' prefix")
    return ShardSource(paths, num_classes)


def _read_names(path: Path) -> list[str] | None:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None


def _open_folder(
    root: Path, name: str, num_classes: int, train: Path | None
) -> tuple[FolderSource, list[str]]:
    names = class_folders(root)
    if not names:
        raise ValueError(
            f"{name}: {root} has no class folders: sort its images into one folder per class "
            "(a flat validation folder carries no labels)"
        )
    expected = class_folders(train) if train is not None and train.is_dir() else names
    if differing := sorted(set(names) ^ set(expected)):
        raise ValueError(
            f"{name}: {root} and {train} differ in {len(differing)} class folders, first "
            f"'{differing[0]}': labels would shift, so give both the same (one may be empty)"
        )
    if num_classes and len(names) > num_classes:
        raise ValueError(
            f"{name}: {root} has {len(names)} class folders, but model.num_classes={num_classes}: "
            f"set model.num_classes={len(names)}"
        )
    return FolderSource(root), names
