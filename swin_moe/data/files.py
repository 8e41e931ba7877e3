"""Samples that are files below a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .names import Names


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
    ) -> None:
        self.root, self.labels, self.runs, self.class_names = root, labels, runs, class_names
        self.class_counts = np.bincount(labels, minlength=len(class_names or ()))
        self._names, self._kind = names, kind

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
        return Path(self.key(index)).read_bytes()
