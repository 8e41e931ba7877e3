"""Digests of files, and the user's small text files: regular, of bounded size and nesting."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .text import plain

LIMIT = 64 << 20  # bytes of a text file; manifests of the largest data sets are smaller
DEPTH = 32  # levels of nesting
_KINDS = {"d": "a folder", "p": "a pipe", "s": "a socket", "c": "a device", "b": "a device"}


def check_regular(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of a regular file.

    Raises:
        ValueError: it is a folder, a device, a pipe or a socket; reading could block.
        OSError: it does not exist, or permission is denied.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.filemode(status.st_mode)[0], "something special")
        raise ValueError(f"{plain(path)} is {kind}, not a file")
    return status.st_size


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: str | os.PathLike[str], limit: int = LIMIT) -> str:
    """Read a UTF-8 file (with or without a byte order mark) of at most ``limit`` bytes.

    Raises:
        ValueError: not a regular file, too large, or not UTF-8; one line that names the file.
        OSError: it cannot be read.
    """
    size = check_regular(path)
    if size > limit:
        raise ValueError(f"{plain(path)} has {size:,} bytes; at most {limit:,} are read here")
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it grew, or it has no size, like files in /proc
        raise ValueError(f"{plain(path)} has more than {limit:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{plain(path)} is not UTF-8 text (byte {error.start:,}): save it as UTF-8"
        ) from None


@contextmanager
def openable(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a file a name in UTF-8, for libraries that open no other."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield name


def read_json(path: str | os.PathLike[str], limit: int = LIMIT) -> Any:
    """Read a JSON file, see :func:`read_text`.

    Raises:
        ValueError: as :func:`read_text`, or not JSON, or nested too deeply; names the file.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, limit), plain(path))


def parse_json(text: str, source: str) -> Any:
    """Parse a JSON text; ``source`` names it in errors, see :func:`read_json`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source} is nested deeper than {DEPTH} levels") from None
    except ValueError as error:  # includes numbers with too many digits
        raise ValueError(f"{source} is not valid JSON ({error})") from None
    check_depth(value, source)
    return value


def check_depth(value: Any, source: str) -> None:
    """Raise ``ValueError`` if lists and mappings are nested deeper than ``DEPTH`` levels."""
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
