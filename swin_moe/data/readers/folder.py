"""Samples as image files in one folder per class, the layout of torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...common.text import plain
from ..files import FileSource
from ..names import Names
from ..which import PassedOver, is_companion, is_image


def class_folders(root: Path, passed: PassedOver | None = None) -> list[str]:
    """Return the sorted names of the class folders; empty if there are none.

    Args:
        passed: counts the files next to them.

    Raises:
        ValueError: the folder cannot be read, or a link in it is broken: it may be a class.
    """
    real = os.path.realpath(root)
    names = []
    for entry in _entries(str(root)):
        if _is_class(entry, real):
            names.append(entry.name)
        elif passed is not None and not entry.is_dir():
            passed.add(entry.name)
    return names


def _is_class(entry: os.DirEntry[str], root: str) -> bool:
    if is_companion(entry.name):
        return False
    if not entry.is_symlink():
        return entry.is_dir()
    if not os.path.exists(entry.path):
        if is_image(entry.name):
            return False
        raise ValueError(
            f"{plain(entry.path)} is a link to {plain(os.readlink(entry.path))}, which does not "
            "exist: mend the link or remove it (it may be a class)"
        )
    return entry.is_dir() and not _is_above(os.path.realpath(entry.path), root)


def _is_above(folder: str, other: str) -> bool:
    """Return whether ``folder`` is ``other`` or contains it; both are real paths."""
    return other == folder or other.startswith(folder.rstrip("/") + "/")


def open_folder(root: Path) -> FileSource:
    """Open the ``root/class/…/image`` files.

    Classes are numbered by sorted name, and files are sorted, as in torchvision, whose list of
    tuples takes a gigabyte per million images.

    Raises:
        ValueError: a folder cannot be read.
    """
    names, passed = Names(), PassedOver()
    classes = class_folders(root, passed)
    runs = np.zeros(len(classes), np.int64)
    for label, name in enumerate(classes):
        for file in _image_files(str(root), name, passed, [str(root)]):
            names.append(file)
            runs[label] += 1
    names.freeze()
    labels = np.repeat(np.arange(len(runs), dtype=np.int32), runs)
    kind = f"image folder ({plain(root)})"
    return FileSource(root, names, labels, runs, classes, kind, passed.line())


def _image_files(root: str, inside: str, passed: PassedOver, above: list[str]) -> Iterator[str]:
    """Yield names below ``root`` of the images in its folder ``inside`` and its sub-folders.

    Args:
        above: the folders on the way; a link to one of them would never end.
    """
    folders = []
    parents = [*above, f"{root}/{inside}"]
    for entry in _entries(parents[-1]):
        if entry.is_dir():
            if is_companion(entry.name):
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if any(_is_above(target, os.path.realpath(folder)) for folder in parents):
                    passed.kinds["links to a folder above"] += 1
                    continue
            folders.append(entry.name)
        elif is_companion(entry.name) or not is_image(entry.name):
            passed.add(entry.name)
        elif entry.is_file():
            yield f"{inside}/{entry.name}"
        else:
            broken = entry.is_symlink() and not os.path.exists(entry.path)
            passed.kinds["links to nothing" if broken else "pipes or devices"] += 1
    for name in folders:
        yield from _image_files(root, f"{inside}/{name}", passed, parents)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{plain(folder)}: the folder cannot be read ({error.strerror})") from None
