"""Explains errors of the operating system: the file, its config key, and how to mend them."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

from ..common.text import plain

_PLACE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EIO,
    errno.ESTALE, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip
_ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EACCES: "give yourself the right to use it",
    errno.EPERM: "give yourself the right to use it",
    errno.EROFS: "nothing can be written there",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file: check it",
    errno.EISDIR: "a file is needed, and this is a folder: check the path",
    errno.EEXIST: "remove it",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "the disk or its server fails; the system's log (dmesg) says more",
    errno.ESTALE: "its file server has lost it: mount it again",
    errno.EMFILE: "allow more open files (ulimit -n), or lower data.num_workers",
    errno.ENFILE: "close other programs: this machine has too many open files",
    errno.ENOMEM: "free memory, or lower data.num_workers and data.batch_size",
    errno.EAGAIN: "allow more processes (ulimit -u), or lower data.num_workers",
}


def explain(error: OSError, arguments: argparse.Namespace) -> str:
    """Return one line with the file, the error, the config key and how to mend it."""
    if error.errno is None or error.strerror is None:  # raised by this package, or by a socket
        return str(error)
    place, key = "", ""
    paths = _configured_paths(arguments)
    if isinstance(error.filename, (str, bytes)):
        path = os.fsdecode(error.filename)
        place, key = f"{plain(path)}: ", _key_of(Path(path).absolute(), paths)
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):  # a write names no file
        key = "train.output" if "train.output" in paths else ""
    name = f" ({key}={plain(paths[key])})" if key else ""
    advice = _ADVICE.get(error.errno, "")
    elsewhere = f", or set another {key}" if key and error.errno in _PLACE_ERRORS else ""
    return f"{place}{error.strerror}{name}{advice and ': ' + advice}{elsewhere}"


def _key_of(path: Path, paths: dict[str, str]) -> str:
    """Return the key that names ``path``, a file in it or a folder around it; or nothing."""
    for key, value in paths.items():
        named = Path(value).expanduser().absolute()
        if named == path or named in path.parents or path in named.parents:
            return key
    return ""


def _configured_paths(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the files and folders that the config names, by key."""
    if not isinstance(getattr(arguments, "config", None), str):
        return {}
    from ..config import load_config

    try:
        config = load_config(arguments.config, getattr(arguments, "overrides", []))
    except (ValueError, OSError):
        return {}
    paths = {
        "train.output": config.train.output,
        "model.pretrained": config.model.pretrained,
        "zero.nvme_path": config.zero.nvme_path,
        "data.path": config.data.path,
    }
    return {key: path for key, path in paths.items() if path}
