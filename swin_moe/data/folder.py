"""Samples as image files in one folder per class, as torchvision's ImageFolder has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from .names import Names


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders; empty if there are none.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        # Dot-folders are of programs, such as our index.
        return [name for name in find_classes(root)[0] if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{root}: the folder cannot be read ({error.strerror})") from None


class FolderSource:
    """Random access to ``root/class/…/image`` files; see :class:`~.source.Source`.

    The classes are numbered by sorted name, and their files come in sorted order, as in
    torchvision, whose list of tuples would take a gigabyte per million images.

    Raises:
        ValueError: a folder cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        names = class_folders(root)
        self.class_names: list[str] | None = names
        self.runs = np.zeros(len(names), np.int64)
        self._names = Names()
        for label, name in enumerate(names):
            for file in _image_files(root, name):
                self._names.append(file)
                self.runs[label] += 1
        self._names.freeze()
        self.class_counts = self.runs
        self.labels = np.repeat(np.arange(len(self.runs), dtype=np.int32), self.runs)

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """Format, for the log; adding up the files' sizes would take minutes on a file server."""
        return f"image folder ({self.root})"

    def key(self, index: int) -> str:
        """Path of a sample."""
        return str(self.root / self._names[index])

    def read(self, index: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            OSError: the file cannot be read.
        """
        return Path(self.key(index)).read_bytes()


def _image_files(root: Path, name: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: the folder cannot be read ({error.strerror})")

    for folder, below, files in os.walk(root / name, onerror=refuse, followlinks=True):
        below.sort()
        inside = os.path.relpath(folder, root)
        yield from (
            f"{inside}/{file}" for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS)
        )
