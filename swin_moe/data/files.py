"""The interface of all readers of samples, and the reader of image files below a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .decode import MAX_PIXELS, UnreadableImage
from .names import Names

BYTES_PER_PIXEL = 4  # bounds the size of a file: as uncompressed 8-bit RGBA
SMALL = 64 << 20  # bytes that a file may always have: metadata may exceed the pixels


class Source(Protocol):
    """Random access to encoded images and their labels.

    Attributes:
        labels: [N] integers, maybe memory-mapped.
        runs: int64, the lengths of the parts that lie together in storage.
        class_counts: int64 [classes], samples of each.
        class_names: by label, None if the data has none.
        passed_over: one line on files that are no samples; empty without any.
        max_pixels: see :class:`Bounded`, also for ``numbered`` and ``renamed``.
    """

    numbered: bool
    renamed: Sequence[str]
    passed_over: str
    max_pixels: int
    runs: np.ndarray
    class_counts: np.ndarray
    class_names: list[str] | None

    @property
    def labels(self) -> np.ndarray: ...
    def __len__(self) -> int: ...

    def describe(self) -> str:
        """Return format and, if known, size for the log."""

    def key(self, index: int) -> str:
        """Return a sample's name: its path, or its archive and its name there."""

    def read(self, index: int) -> bytes:
        """Read the encoded image of a sample.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or holds no image within the bounds.
        """


class Bounded:
    """The common base of all readers, with bounds on an image.

    Attributes:
        max_pixels: of an image, see ``data.max_pixels``; it also bounds the bytes of a file.
        numbered: labels are numbers in the data. Otherwise a label is the place of a class's name
            in the sorted list of names.
        renamed: the model's names of classes that this data set names differently.
    """

    max_pixels = MAX_PIXELS
    numbered = False
    renamed: Sequence[str] = ()

    def checked_size(self, size: int) -> int:
        """Return the size in bytes of an encoded image.

        Raises:
            UnreadableImage: it is larger than any image within the bounds.
        """
        most = max(BYTES_PER_PIXEL * self.max_pixels, SMALL)
        if size > most:
            raise UnreadableImage(
                "too large",
                f"a file of {size:,} bytes; at most {most:,} are read with data.max_pixels="
                f"{self.max_pixels}: raise it, or shrink the image",
            )
        return size


class FileSource(Bounded):
    """Random access to image files by their names below ``root``; see :class:`Source`."""

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
        return self._kind  # the sum of sizes would take minutes on a file server

    def key(self, index: int) -> str:
        return str(self.root / self._names[index])

    def read(self, index: int) -> bytes:
        descriptor = os.open(self.key(index), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
                raise ValueError("not a regular file")
            self.checked_size(status.st_size)
            return file.readall()
