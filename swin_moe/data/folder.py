"""Samples as image files in one folder per class, read through torchvision's ImageFolder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders; empty if there are none."""
    try:
        return find_classes(root)[0]
    except FileNotFoundError:
        return []


class FolderSource:
    """Random access to ``root/class/…/image`` files; the classes are numbered by sorted name.

    Holds arrays rather than ImageFolder's list of tuples: reading a list changes its reference
    counts, which copies it into every worker process page by page.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        folder = ImageFolder(str(root), allow_empty=True)
        self.class_names: list[str] = folder.classes
        self.labels = np.array(folder.targets, dtype=np.int64)
        self.runs = np.bincount(self.labels)
        start = len(str(root)) + 1
        self._names = np.array([path[start:].encode() for path, _ in folder.samples], np.bytes_)

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """Format, for the log; adding up the files' sizes would take minutes on a file server."""
        return f"image folder ({self.root})"

    def key(self, index: int) -> str:
        """Path of a sample."""
        return str(self.root / self._names[index].decode())

    def read(self, index: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            OSError: the file cannot be read.
        """
        return Path(self.key(index)).read_bytes()
