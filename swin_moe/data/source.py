"""From ``data.path`` and a split's name to the samples themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..common.text import plain
from ..config import DataConfig
from .classes import match
from .files import Source
from .names import read_classes
from .readers.file_list import open_list
from .readers.folder import class_folders, open_folder
from .readers.index import is_manifest, read_timm_info
from .readers.parquet import ParquetSource
from .readers.scan import have_labels
from .readers.shards import (
    SUFFIXES,
    class_of,
    find_parquets,
    find_shards,
    is_pattern,
    open_manifest,
    open_shards,
)
from .readers.zipped import ZipSource, zipped_class_folders
from .which import is_companion, is_image

log = logging.getLogger(__name__)

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
BUNDLED = {"fashion_mnist": Path(__file__).parent / "fashion_mnist"}


def _is_bundled(path: str) -> bool:
    """Return whether a path names the bundled sample; a folder of copied recipes is no data."""
    root = Path(path)
    if path not in BUNDLED or not root.is_dir():
        return path in BUNDLED and not root.exists()
    return {file.suffix for file in root.iterdir()} == {".yaml"}


def open_source(
    data: DataConfig, num_classes: int, training: bool, classes: list[str] | None = None
) -> Source:
    """Open one split, and detect its format.

    Args:
        num_classes: labels must lie in [0, num_classes); 0 (a model without a head) allows any.
        classes: names of the model's classes by label; the data's are matched with them. None if
            the model has no names.

    Raises:
        ValueError: the split is absent or empty, the splits differ in classes, the model lacks a
            class, or a label is out of range; one line naming the path and the key to mend.
    """
    root = BUNDLED[data.path] if _is_bundled(data.path) else Path(data.path)
    if not root.is_dir() and not is_pattern(str(root)):
        raise ValueError(_no_such_folder(data.path))
    name, split = ("data.train", data.train) if training else ("data.val", data.val)
    try:
        source = _open_split(root, split)
        if source is None:
            raise ValueError(
                f"found no {root / split}, and no shards {root / split}-*.tar (.tar.gz, .tgz), "
                f"{split}.zip, {split}_map.txt or {split}-*.parquet there: set it to a sub-folder "
                "or to the files' prefix"
            )
        if not len(source):
            others = f" ({source.passed_over})" if source.passed_over else ""
            raise ValueError(f"{root / split} holds no images{others}")
        if not training and (classes is None or data.match_classes == "number"):
            _check_same_classes(root / split, root / data.train)
        _check_names(source)
    except ValueError as error:
        raise ValueError(f"{name}={split}: {error}") from None
    source.max_pixels = data.max_pixels
    if classes is not None and data.match_classes == "name":
        source = match(source, classes, f"data.path={plain(data.path)}, {name}={plain(split)}")
    try:
        _check_labels(source, num_classes)
    except ValueError as error:
        raise ValueError(f"{name}={split}: {error}") from None
    return source


def empty_classes(source: Source, num_classes: int) -> str:
    """Return a note on classes without samples, of the model or by name; empty without any."""
    total = max(num_classes, len(source.class_names or ()))
    present = np.flatnonzero(source.class_counts)
    empty = np.setdiff1d(np.arange(total), present, assume_unique=True).tolist()
    if not empty:
        return ""
    names = source.class_names
    first = f"'{names[empty[0]]}'" if names and empty[0] < len(names) else str(empty[0])
    return (
        f"{len(empty):,} of {total:,} classes have no sample, first {first}: fill them, or lower "
        "model.num_classes"
    )


def open_path(path: Path) -> Source | None:
    """Open the samples at one place: a folder, a file, or a prefix or pattern of shards.

    Returns:
        None if the place is empty.

    Raises:
        ValueError: the data cannot be used; one line.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.name.endswith(SUFFIXES):
            return open_shards([path], _class_names(path.parent))
        if path.suffix == ".zip":
            listing = path.with_name(f"{path.stem}_map.txt")
            return ZipSource(path, listing if listing.is_file() else None)
        if path.suffix == ".parquet":
            return ParquetSource([path])
        if path.suffix == ".json":
            return open_manifest(path, _class_names(path.parent))
        return open_list(path)
    if shards := find_shards(str(path)):
        return open_shards(shards, _class_names(path.parent))
    parquets = find_parquets(str(path))
    return ParquetSource(parquets) if parquets else None


def open_splits(path: Path) -> dict[str, Source]:
    """Open ``train`` and ``val`` of a data set's root, or the samples at one place as ``train``.

    Raises:
        ValueError: the data is absent or cannot be used; one line.
    """
    if path.is_dir() and not _is_flat(path / "train"):
        found = {name: _open_split(path, name) for name in ("train", "val", "validation")}
        if found["train"] is not None:
            held_out = found["val"] or found["validation"]
            _warn_of_other_splits(path, "val" if found["val"] else "validation")
            return {"train": found["train"]} | ({"val": held_out} if held_out else {})
    source = open_path(path)
    if source is None:
        raise ValueError(
            f"{path}: nothing that can be read: give a folder of class folders, of tars or of "
            "parquet files, a .zip, a list of files with labels, or a pattern of shards"
        )
    if splits := _splits_as_classes(source):
        raise ValueError(
            f"{plain(path)}: {splits}: give a folder of train/CLASS/… and val/CLASS/…, or each "
            "split by itself, unpacked"
        )
    return {"train": source}


def _warn_of_other_splits(root: Path, held_out: str) -> None:
    """Warn of folders that look like splits, but are not read."""
    rest = [name for name in SPLITS if name not in ("train", held_out) and (root / name).is_dir()]
    if rest := [name for name in rest if not _is_flat(root / name)]:
        log.warning(
            "%s: train and val are read, but not %s: rename it to val, or give it by itself",
            plain(root),
            " and ".join(rest),
        )


def _is_flat(folder: Path) -> bool:
    """Return whether this is a folder of files only: a class with a split's name."""
    return folder.is_dir() and not any(
        entry.is_dir() or entry.name.endswith((*SUFFIXES, ".parquet"))
        for entry in folder.iterdir()
        if not is_companion(entry.name)
    )


def _open_split(root: Path, split: str) -> Source | None:
    for place in _places(root, split):
        if (source := open_path(place)) is not None:
            return source
    info = root / "_info.json"
    names = read_timm_info(info, split) if info.is_file() else None
    if names is None:
        return None
    if missing := [name for name in names if not (root / name).is_file()]:
        raise ValueError(f"{root / missing[0]}: no such shard, but {info} lists it: copy it again")
    return open_shards([root / name for name in names], _class_names(root))


def _places(root: Path, split: str) -> Iterator[Path]:
    """Yield the places of a split, the most definite first."""
    if (manifest := root / f"{split}.json").is_file() and is_manifest(manifest):
        yield manifest
    yield root / split
    for name in (f"{split}.zip", f"{split}_map.txt"):
        if (root / name).is_file():
            yield root / name
    yield root / "data" / split  # Hugging Face's layout


def _open_folder(root: Path) -> Source:
    shards, parquets = _files(root, SUFFIXES), _files(root, ".parquet")
    if packed := shards or parquets:
        _check_alone(root, packed)
    if shards and have_labels(shards):
        return open_shards(shards, _class_names(root) or _class_names(root.parent))
    if len(shards) == 1 and class_of(shards[0]).lower() in SPLITS:
        raise ValueError(
            f"{plain(shards[0])} has no labels (.cls), and a tar per class is called like its "
            "class: unpack it"
        )
    if shards:
        shards.sort(key=class_of)  # the order of class folders
        return open_shards(shards, [class_of(path) for path in shards], range(len(shards)))
    if parquets:
        return ParquetSource(parquets)
    if not class_folders(root):
        raise ValueError(
            f"{root} has no class folders: sort its images into one folder per class, or give a "
            "list of files with labels instead (a flat validation folder carries no labels)"
        )
    return open_folder(root)


def _check_alone(root: Path, packed: list[Path]) -> None:
    """Raise ``ValueError`` for images in class folders next to tars or parquet files."""
    tars = {class_of(path) for path in packed if path.name.endswith(SUFFIXES)}
    folders = (entry for entry in root.iterdir() if entry.name not in tars and entry.is_dir())
    for name in sorted(folder.name for folder in folders if not is_companion(folder.name)):
        if any(is_image(file) for _, _, files in os.walk(root / name) for file in files):
            raise ValueError(
                f"{root} holds {plain(packed[0].name)} next to the class folder '{plain(name)}': "
                "move one of them away"
            )


def _files(folder: Path, ends: str | tuple[str, ...]) -> list[Path]:
    """Return the sorted files of these suffixes, without a system's hidden ones."""
    found = (path for path in folder.iterdir() if path.name.endswith(ends))
    return sorted(path for path in found if not is_companion(path.name))


def _no_such_folder(path: str) -> str:
    if Path(path).is_file():
        return (
            f"data.path={plain(path)} is a file: give the folder that it is in, and its name as "
            "data.train or data.val"
        )
    place = "" if Path(path).is_absolute() else f" in {plain(Path.cwd())}, where you are"
    return (
        f"data.path={plain(path)}: no such folder{place}: give a folder of images, a folder of "
        f"tar shards, or the name of a bundled sample ({', '.join(BUNDLED)})"
    )


def _class_names(folder: Path) -> list[str] | None:
    path = folder / "classes.txt"
    return read_classes(path) if path.is_file() else None


def _check_same_classes(val: Path, train: Path) -> None:
    """Raise ``ValueError`` if labels are places in sorted lists of names, and the lists differ."""
    held_out, trained = (_named_by_place(folder) for folder in (val, train))
    if held_out is None or trained is None:
        return
    if differing := sorted(set(held_out) ^ set(trained)):
        raise ValueError(
            f"{val} and {train} differ in {len(differing)} class folders, first "
            f"'{differing[0]}': labels would shift, so give both the same (one may be empty)"
        )


def _named_by_place(split: Path) -> list[str] | None:
    if (manifest := split.with_name(f"{split.name}.json")).is_file() and is_manifest(manifest):
        return _class_names(split.parent)
    if split.is_dir():
        tars = _files(split, SUFFIXES)
        if not tars:
            return class_folders(split)
        return None if have_labels(tars) else sorted(map(class_of, tars))
    archive = split if split.suffix == ".zip" else split.with_name(f"{split.name}.zip")
    if archive.is_file() and not archive.with_name(f"{archive.stem}_map.txt").is_file():
        return zipped_class_folders(archive)
    return None


def _check_names(source: Source) -> None:
    counts, names = source.class_counts, source.class_names
    if names is not None and len(counts) > len(names):
        raise ValueError(
            f"{len(names)} class names, but a label is {len(counts) - 1}: give every class a line "
            "in classes.txt, or remove the file"
        )
    if splits := _splits_as_classes(source):
        raise ValueError(
            f"{splits}: set data.path to the folder that holds them, and unzip an archive of them "
            "first"
        )


def _splits_as_classes(source: Source) -> str:
    """Return a note if the class names are those of splits; otherwise an empty text."""
    names = source.class_names or []
    split = [name for name in names if name.lower() in SPLITS]
    if len(split) < 2 or split != names:
        return ""
    return f"its classes are '{split[0]}' and '{split[1]}', which are splits"


def _check_labels(source: Source, num_classes: int) -> None:
    counts, names = source.class_counts, source.class_names
    if num_classes and names and len(counts) > num_classes and not counts[num_classes:].any():
        raise ValueError(
            f"it has {len(names):,} classes, of which the last, '{plain(names[-1])}', has no "
            f"sample: set model.num_classes={len(names)}, or remove what is empty"
        )
    if num_classes and len(counts) > num_classes:
        first = int(np.argmax(source.labels >= num_classes))
        raise ValueError(
            f"the label of {source.key(first)} is {source.labels[first]}, not in [0, {num_classes})"
            f": mend the data or set model.num_classes={len(names or counts)}"
        )
