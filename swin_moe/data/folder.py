"""Samples as image files in one folder per class, as torchvision's ImageFolder has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .files import FileSource
from .names import Names

# As in torchvision.datasets.folder, which imports all of torchvision.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders; empty if there are none.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise ValueError(f"{root}: the folder cannot be read ({error.strerror})") from None
    # Dot-folders are of programs, such as our index.
    return [name for name in folders if not name.startswith(".")]


def open_folder(root: Path) -> FileSource:
    """The ``root/class/…/image`` files.

    The classes are numbered by sorted name, and their files come in sorted order, as in
    torchvision, whose list of tuples would take a gigabyte per million images.

    Raises:
        ValueError: a folder cannot be read.
    """
    classes = class_folders(root)
    runs = np.zeros(len(classes), np.int64)
    names = Names()
    for label, name in enumerate(classes):
        for file in _image_files(root, name):
            names.append(file)
            runs[label] += 1
    names.freeze()
    labels = np.repeat(np.arange(len(runs), dtype=np.int32), runs)
    return FileSource(root, names, labels, runs, classes, f"image folder ({root})")


def _image_files(root: Path, name: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: the folder cannot be read ({error.strerror})")

    for folder, below, files in os.walk(root / name, onerror=refuse, followlinks=True):
        below.sort()
        inside = os.path.relpath(folder, root)
        yield from (
            f"{inside}/{file}" for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS)
        )
