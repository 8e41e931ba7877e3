"""Samples that are files below a folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

from .names import Names

MAX_FILE = 1 << 30  # bytes of one encoded image: what claims more is no sample


def read_image_file(path: str) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, which may never end, or larger than any image.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        checked_size(status.st_size)
        return file.read(MAX_FILE)


def checked_size(size: int) -> int:
    """The size in bytes of an encoded image; ValueError if it is none's."""
    if size > MAX_FILE:
        raise ValueError(f"{size:,} bytes, more than the {MAX_FILE:,} of one image that are read")
    return size


class FileSource:
    """Random access to image files, by their names below ``root``; see :class:`~.source.Source`."""

    def __init__(
        self,
        root: Path,
        names: Names,
        labels: np.ndarray,
        runs: np.ndarray,
        class_names: list[str] | None,
        kind: str,
        passed_over: str = "",
    ) -> None:
        self.root, self.labels, self.runs, self.class_names = root, labels, runs, class_names
        self.class_counts = np.bincount(labels, minlength=len(class_names or ()))
        self._names, self._kind, self.passed_over = names, kind, passed_over

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """Format, for the log; adding up the files' sizes would take minutes on a file server."""
        return self._kind

    def key(self, index: int) -> str:
        """Path of a sample."""
        return str(self.root / self._names[index])

    def read(self, index: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            OSError: the file cannot be read.
        """
        return read_image_file(self.key(index))
