"""Folders of checkpoints: list, verify, choose and prune them."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..common.reading import read_json, sha256
from ..common.text import plain

log = logging.getLogger("swin_moe")
T = TypeVar("T")

FORMAT = 2
CLASSES = "classes.json"  # a list of names by label, if the data has names
MANIFEST_LIMIT = 1 << 30  # bytes: it grows with tensors and processes
REQUIRED = {"rank-00000.safetensors", "state.json", "config.yaml"}
READS = 5  # tries to read a run that still trains
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP}  # no faults of a disk
_NAME = re.compile(r"^step-(\d{8,})$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line for the user."""


class FormatError(CheckpointError):
    """An undamaged checkpoint of another version of the program."""


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``: size and digest by file, and the tensors' spans as JSON."""

    files: dict[str, tuple[int, str]]
    tensors: dict[str, Any]


def write_manifest(path: Path, files: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write ``path/manifest.json`` with a digest of itself."""
    content = {"format": FORMAT, "files": files, "tensors": tensors}
    (path / "manifest.json").write_text(json.dumps({"sha256": _own_digest(content), **content}))


def read_manifest(path: Path) -> Manifest:
    """Read ``path/manifest.json``.

    Raises:
        CheckpointError: it is missing or damaged, or lacks a required file.
        FormatError: another version wrote it.
    """
    try:
        content = read_json(path / "manifest.json", MANIFEST_LIMIT)
        digest, version = content.pop("sha256", ""), int(content["format"])
        files = {str(n): (int(e["bytes"]), str(e["sha256"])) for n, e in content["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no manifest.json (the write did not finish)") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: manifest.json is damaged") from None
    except OSError as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read ({error.strerror})") from None
    if version != FORMAT:
        newer = "a newer version of swin-moe wrote it" if version > FORMAT else "write it again"
        raise FormatError(
            f"{path}: written in format {version}, this version reads {FORMAT} ({newer})"
        )
    if digest != _own_digest(content) or not isinstance(content.get("tensors"), dict):
        raise CheckpointError(f"{path}: manifest.json is damaged")
    if not set(files) >= REQUIRED:
        raise CheckpointError(f"{path}: manifest.json names no {min(REQUIRED - set(files))}")
    return Manifest(files, content["tensors"])


def class_names(path: Path) -> list[str] | None:
    """Return the class names of a checkpoint's model by label; None if it has none.

    Raises:
        CheckpointError: ``classes.json`` is not a list of names.
    """
    try:
        names = read_json(path / CLASSES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {CLASSES} cannot be read ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: {CLASSES} is not a list of names")
    return names


def known_classes(folder: Path) -> list[str] | None:
    """Return the names in a run's newest checkpoint that has any; skip damaged lists."""
    for path in list_checkpoints(folder):
        try:
            names = class_names(path)
        except CheckpointError:
            continue
        if names is not None:
            return names
    return None


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def sync(path: Path) -> None:
    """Flush a file or folder to disk before a rename to it.

    Some network file systems cannot flush folders, and need not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, newest first, without verifying them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def find(path: Path) -> list[Path]:
    """Return the checkpoints of a run directory, newest first, or ``path`` if it is one.

    Raises:
        CheckpointError: there are none.
    """
    if (path / "manifest.json").exists():
        return [path]
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run directory that holds one")
    return found


def choose(path: Path) -> Path:
    """Return the newest whole checkpoint of a run directory, or ``path`` if it is one.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    found = find(path)
    if found == [path]:
        return path
    for _ in range(READS):
        try:
            return latest(path / "checkpoints") or path
        except CheckpointError:
            now = list_checkpoints(path / "checkpoints")
            if now == found:
                raise
            found = now  # a running training removed one in the meantime
    raise CheckpointError(f"{path}: its checkpoints change while they are read: try again")


def read_newest(path: Path, read: Callable[[Path], T]) -> T:
    """Return the result of ``read`` for the checkpoint that :func:`choose` finds.

    Links are resolved first, since they may move. If a running training removes the checkpoint
    meanwhile, a newer one is read.

    Raises:
        CheckpointError: there is none, or it was removed.
    """
    for _ in range(READS):
        found = choose(path)
        found = found.resolve() if found.is_symlink() else found
        try:
            return read(found)
        except (OSError, ValueError):
            if found.is_dir():
                raise
        if found == path:
            raise CheckpointError(f"{path} is gone: did a running training remove it?")
    raise CheckpointError(f"{path}: its checkpoints change while they are read: try again")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> None:
    """Check sizes and digests against the manifest.

    Raises:
        CheckpointError: a file is missing, truncated, changed or unreadable.
    """
    files = read_manifest(path).files
    try:
        for name, (size, _) in files.items():
            file = path / name
            if Path(name).name != name or not file.is_file():
                raise CheckpointError(f"{path}: {name} is missing")
            if file.stat().st_size != size:
                raise CheckpointError(f"{path}: {name} has {file.stat().st_size} of {size} bytes")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda name: sha256(path / name), files)
            for (name, (_, digest)), found in zip(files.items(), digests, strict=True):
                if found != digest:
                    raise CheckpointError(f"{path}: the content of {name} has changed (SHA-256)")
        _check_step(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror}") from None


def _check_step(path: Path) -> None:
    """Check that the folder's name and its state name the same update."""
    if not _NAME.match(path.name):
        return
    try:
        state = read_json(path / "state.json")
        position = state.get("position", state)
        named = {int(state["step"]), int(position["step"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: state.json is damaged ({error})") from None
    if named != {step_of(path)}:
        steps = " and ".join(map(str, sorted(named)))
        raise CheckpointError(f"{path}: its state.json is of step {steps}, not the folder's")


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, None if there is none; log damaged ones.

    Raises:
        CheckpointError: all checkpoints are damaged, or the newest whole one is of another format.
    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            verify(path)
        except FormatError:
            raise
        except CheckpointError as error:
            if path.is_dir():  # otherwise a running training has removed it
                log.warning("damaged checkpoint passed over: %s", error)
            continue
        return path
    if found:
        raise CheckpointError(
            f"{folder}: all {len(found)} checkpoints are damaged (see the warnings above); "
            "`swin-moe train --fresh` keeps them and starts from the beginning"
        )
    return None


def set_aside_newer(folder: Path, chosen: Path) -> None:
    """Rename the damaged checkpoints newer than ``chosen``, so that they no longer count."""
    for path in list_checkpoints(folder):
        if path.name == chosen.name:
            return
        set_aside(path)


def set_aside(path: Path) -> None:
    """Rename a checkpoint to damaged-…, so that it no longer counts."""
    aside = path.with_name(f"damaged-{path.name}")
    remove(aside)
    path.rename(aside)


def prune(folder: Path, keep_last: int, best: Path | None) -> None:
    """Remove all but the newest ``keep_last`` and the best; point ``last`` and ``best`` at them.

    If the best could not be written, the former best stays. Errors of the file system are only
    logged: the checkpoints do not depend on removals and links.
    """
    found = list_checkpoints(folder)
    if best is not None and not best.exists():
        best = folder / (folder / "best").resolve().name
    for path in found[keep_last:]:
        if best is None or path.name != best.name:
            try:
                discard(path)
            except OSError as error:
                _warn_once(f"{plain(path)} cannot be removed ({error.strerror})")
    for name, target in (("last", found[0] if found else None), ("best", best)):
        if target in found:
            _point(folder / name, target.name)


@functools.cache  # otherwise logged at each save
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _point(link: Path, target: str) -> None:
    """Make ``link`` a link to ``target`` and replace a former file; a folder of that name stays."""
    if link.is_dir() and not link.is_symlink():
        _warn_once(f"{plain(link)} is a folder where a link belongs: remove it")
        return
    temporary = link.with_name(f".{link.name}")
    try:
        remove(temporary)
        temporary.symlink_to(target)
        temporary.replace(link)
    except OSError as error:  # for example a file system without links
        _warn_once(f"{plain(link)} cannot be made a link to a checkpoint ({error.strerror})")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content; it need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Rename a checkpoint and then remove it, so that a kill leaves no half of one."""
    gone = path.with_name(f"partial-{path.name}")
    remove(gone)
    path.rename(gone)
    remove(gone)


def clear_partial(folder: Path) -> None:
    """Remove the rest of unfinished writes and removals; none may be in progress."""
    for path in folder.glob("partial-*") if folder.is_dir() else []:
        try:
            remove(path)
        except OSError as error:
            log.warning("%s cannot be removed (%s)", plain(path), error.strerror)
