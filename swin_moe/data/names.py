"""Compact lists of millions of file names, and lists of class names."""

from __future__ import annotations

import os
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..common.reading import LIMIT, check_regular
from ..common.text import plain


class Names:
    """A list of strings in two blocks of memory: their bytes, and eight bytes per string.

    A Python list takes about a hundred bytes more per string. Reading it changes reference counts,
    which copies it into every worker process page by page.
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
        """Pack the names; no more can be appended."""
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


def finder(names: Sequence[str]) -> Callable[[str], int]:
    """Return a function from a name to its place in a list, −1 for an unknown name.

    macOS stores accents as separate characters. Both forms look alike and count as equal.
    """
    known = {unicodedata.normalize("NFC", name): place for place, name in enumerate(names)}
    known |= {name: place for place, name in enumerate(names)}
    return lambda name: known.get(name, known.get(unicodedata.normalize("NFC", name), -1))


def alike(names: Sequence[str]) -> str:
    """Return the first name that equals another except for how accents are stored, or ``""``."""
    seen: set[str] = set()
    for name in names:
        composed = unicodedata.normalize("NFC", name)
        if composed in seen:
            return name
        seen.add(composed)
    return ""


def other_numbers(names: Sequence[str]) -> str:
    """Describe the first name that is a number but not its place: ``10`` sorts before ``2``."""
    for place, name in enumerate(names):
        if name.isdecimal() and int(name[:9]) != place:
            return f": label {place} is class '{name}'"
    return ""


def read_classes(path: Path) -> list[str]:
    """Read class names, one per line; bytes that are not UTF-8 become surrogates, as in paths.

    Raises:
        ValueError: it is no regular file, or too large.
    """
    if (size := check_regular(path)) > LIMIT:
        raise ValueError(f"{plain(path)} has {size:,} bytes; at most {LIMIT:,} are read here")
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def write_classes(path: Path, names: Iterable[str]) -> None:
    """Write a list for :func:`read_classes`; line breaks in names are written as ``\\n``."""
    lines = (plain(name) if "\n" in name or "\r" in name else name for name in names)
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
