"""Millions of file names in two blocks of memory."""

from __future__ import annotations

import os
from array import array

import numpy as np


class Names:
    """A list of strings that takes their bytes and eight more each.

    A Python list takes a hundred more; and reading it changes reference counts, which copies it
    into every worker process page by page.
    """

    def __init__(self) -> None:
        self._growing: tuple[bytearray, array] | None = (bytearray(), array("q", [0]))
        self._bytes = self._bounds = np.empty(0)

    def append(self, name: str) -> None:
        assert self._growing is not None, "frozen"
        content, bounds = self._growing
        content += os.fsencode(name)
        bounds.append(len(content))

    def freeze(self) -> None:
        """No more follow."""
        assert self._growing is not None, "frozen"
        content, bounds = self._growing
        self._bytes = np.frombuffer(bytes(content), np.uint8)
        self._bounds = np.frombuffer(bounds, np.int64)
        self._growing = None

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        start, stop = self._bounds[index], self._bounds[index + 1]
        return os.fsdecode(self._bytes[start:stop].tobytes())
