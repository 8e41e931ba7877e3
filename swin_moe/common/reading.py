"""Reads the user's small text files: regular files only, of bounded size and nesting."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .text import plain

LIMIT = 64 << 20  # bytes of a text file; manifests of the largest data sets stay below it
DEPTH = 32  # levels of nesting


def check_regular(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a regular file.

    Raises:
        ValueError: it is a folder, a device, a pipe or a socket, which could be read for ever.
        OSError: it is not there, or may not be looked at.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{plain(path)} is {_kind(status.st_mode)}, not a file")
    return status.st_size


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "something special")


def read_text(path: str | os.PathLike[str], limit: int = LIMIT) -> str:
    """A UTF-8 text file (with or without a byte order mark) of at most ``limit`` bytes.

    Raises:
        ValueError: one line that names the file: not a regular file, too large, or not UTF-8.
        OSError: it cannot be read.
    """
    size = check_regular(path)
    if size > limit:
        raise ValueError(f"{plain(path)} has {size:,} bytes; at most {limit:,} are read here")
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it grew, or it shows no size, as files in /proc
        raise ValueError(f"{plain(path)} has more than {limit:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{plain(path)} is not UTF-8 text (byte {error.start:,}): save it as UTF-8"
        ) from None


@contextmanager
def openable(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name for a file by which libraries open it that take only names in UTF-8."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield name


def read_json(path: str | os.PathLike[str], limit: int = LIMIT) -> Any:
    """The value of a JSON file, read as by :func:`read_text`.

    Raises:
        ValueError: as there, or it is not JSON or nested too deeply; names the file.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, limit), plain(path))


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text; ``source`` names it in errors, see :func:`read_json`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source} is nested deeper than {DEPTH} levels") from None
    except ValueError as error:  # includes numbers with too many digits
        raise ValueError(f"{source} is not valid JSON ({error})") from None
    check_depth(value, source)
    return value


def check_depth(value: Any, source: str) -> None:
    """Refuse lists and mappings within each other beyond ``DEPTH`` levels (ValueError)."""
    layer, depth = [value], 0
    while layer := [
        inner
        for outer in layer
        if isinstance(outer, (dict, list))
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, (dict, list))
    ]:
        depth += 1
        if depth >= DEPTH:
            raise ValueError(f"{source} is nested deeper than {DEPTH} levels")
