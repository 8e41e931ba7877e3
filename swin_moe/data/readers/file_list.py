"""Lists of image files with labels: the official ``…_map.txt`` and ImageNet-22K's JSON list."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TextIO

import numpy as np

from ...common.reading import check_regular
from ...common.text import plain
from ..files import FileSource
from ..names import Names
from ..which import is_companion
from .index import MAX_CLASSES

CHUNK = 1 << 20  # characters of a JSON list that are read at once
MAX_ENTRY = 1 << 20  # characters of one entry of a JSON list
TABBED = re.compile(r"\t *\d+\s*$")  # the end of a line, whose path may begin like JSON
GAP = re.compile(r"[ \t\r\n,]*")  # between two entries of a JSON list


def open_list(listing: Path) -> FileSource:
    """Open the files that a list names, relative to its folder.

    Args:
        listing: lines of ``path<TAB>label``, or a JSON array of ``[path, label, …]``, like the
            official ``ILSVRC2011fall_whole_map_train.txt``.

    Raises:
        ValueError: the list is malformed, or its first file is missing; one line naming the file
            and the line or entry.
    """
    names, labels, runs = Names(), array("i"), array("q")
    folder = None
    for name, label in read_list(listing):
        names.append(name)
        labels.append(label)
        if (parent := name.rpartition("/")[0]) != folder:
            folder = parent
            runs.append(0)
        runs[-1] += 1
    names.freeze()
    root = listing.parent
    if len(labels) and not (root / names[0]).is_file():
        raise ValueError(
            f"{plain(listing)}: its first file, {plain(root / names[0])}, is missing: the paths "
            "of a list are relative to its own folder"
        )
    kind = f"list of image files ({listing})"
    return FileSource(root, names, np.array(labels, np.int32), np.array(runs, np.int64), None, kind)


def read_list(path: Path) -> Iterator[tuple[str, int]]:
    """Yield relative paths and labels; the lists are too long for Python objects.

    Raises:
        ValueError: the list is malformed; one line naming the file and the line or entry.
    """
    check_regular(path)
    with _open(path) as file:
        start = file.read(1024)
    if "\0" in start:
        raise ValueError(f"{plain(path)}: not a list of files: it is not UTF-8 text")
    first_line = start.lstrip().partition("\n")[0]
    is_json = first_line.startswith("[") and not TABBED.search(first_line)
    entries = _json_entries(path) if is_json else _lines(path)
    what = "entry" if is_json else "line"
    for number, entry in entries:
        name, label = _checked(path, f"{what} {number}", *entry)
        # A program that lists files also lists hidden ones; folders in a list are deliberate.
        if not is_companion(name.rpartition("/")[2]):
            yield name.removeprefix("./"), label


def _open(path: Path) -> TextIO:
    """Open a UTF-8 text in which file names may be any bytes; skip a byte order mark."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def _checked(path: Path, where: str, name: object, label: object) -> tuple[str, int]:
    digits = label if isinstance(label, str) else str(label) if type(label) is int else ""
    is_number = digits.isascii() and digits.isdecimal() and len(digits) < 20
    number = int(digits) if is_number else -1
    if not isinstance(name, str) or not 0 <= number < MAX_CLASSES:
        raise ValueError(
            f"{path}, {where}: {name!r:.60} with {label!r:.20} is not a path with a class number "
            "from 0 on"
        )
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path}, {where}: {name!r:.60} leads out of the list's folder")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError(f"{path}, {where}: {name!r:.60} is no file name") from None
    return name, number


def _lines(path: Path) -> Iterator[tuple[int, tuple[object, object]]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name, tab, label = line.rstrip("\r\n").partition("\t")
            if not tab:
                raise ValueError(
                    f"{path}, line {number}: no tab between a path and its label: write "
                    "path<TAB>number"
                )
            yield number, (name, label.strip())


def _json_entries(path: Path) -> Iterator[tuple[int, tuple[object, object]]]:
    decoder, number = json.JSONDecoder(), 0
    with _open(path) as file:
        buffer, at = file.read(CHUNK).lstrip()[1:], 0
        while True:
            at = _after_gap(buffer, at)
            if buffer.startswith("]", at):
                return
            try:
                entry, end = decoder.raw_decode(buffer, at)
                # A number may go on in the next chunk, but an array cannot.
                if not isinstance(entry, list) or len(entry) < 2:
                    raise ValueError(f"{path}, entry {number + 1}: not a [path, label] pair")
            except (json.JSONDecodeError, RecursionError):
                more = file.read(CHUNK)
                # Text longer than any entry is damaged: do not read the rest of the file.
                if not more or len(buffer) - at > MAX_ENTRY:
                    raise ValueError(
                        f"{path}, entry {number + 1}: the list is damaged or ends too early"
                    ) from None
                buffer, at = buffer[at:] + more, 0
                continue
            number += 1
            yield number, (entry[0], entry[1])
            at = end  # cutting the buffer would copy a megabyte per entry


def _after_gap(buffer: str, at: int) -> int:
    match = GAP.match(buffer, at)
    assert match is not None  # it may be empty
    return match.end()
