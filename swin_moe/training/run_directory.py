"""The run directory: its lock, the checkpoint to resume, its config and its log files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO

import torch
from rich.console import Console

from .. import __version__, checkpoint
from ..common.ranks import hostname, restarts, started_again
from ..common.text import plain
from ..common.writing import LogFile, PlainFormatter, open_to_append
from ..config import Config, ConfigError, dump_config, load_config
from ..config.variants import FORMER
from ..data import Loader
from ..distributed import World, broadcast_object, gather_objects
from ..weights.pretrained import built_windows
from .changes import changed_keys, other_data, summary

log = logging.getLogger("swin_moe")

MARKER = ".swin_moe"  # in every run directory; other directories are never moved or overwritten
held_locks: list[IO[str]] = []  # markers that this process has locked, open until it ends
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}
_PATIENCE, _LEAVING = 60.0, 10.0  # seconds to wait for the lock after a restart, and otherwise


@dataclass
class Run:
    """A run directory and the console of rank 0."""

    folder: Path
    world: World
    console: Console

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def log_file(self) -> Path:
        return self.folder / "logs" / f"rank-{self.world.rank}.log"

    def say(self, text: str) -> None:
        """Print a line on rank 0, and log it on this rank."""
        if self.world.is_main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        log.info("%s", text)


def prepare_folder(
    run: Run,
    config: Config,
    fresh: bool,
    train: Loader | None = None,
    accept_changes: bool = False,
) -> checkpoint.Reader | None:
    """Choose the checkpoint to resume, the same on every rank, and write ``config.yaml``.

    Args:
        train: the training data, which must match the checkpoint's.
        accept_changes: resume also with other data or classes.
    """
    reader = _chosen(run, partial(adopt_folder, run, fresh))
    changes: list[str] = []
    if reader is not None:
        saved = load_config(reader.path / "config.yaml")
        check_same_model(reader, saved, config)
        if train is not None and not accept_changes:
            _check_same_data(reader, saved, config, train)
        changes = changed_keys(saved, config)
    log_to_file(run.log_file)
    record_start(run, "" if reader is None else reader.path.name)
    if reader is not None and changes:
        run.say(summary(changes, int(reader.state["step"])))
        log.debug("all changes: %s", ", ".join(changes))
    if run.world.is_main:
        write_config(run.folder, config, reader if changes else None)
    return reader


def write_config(folder: Path, config: Config, changed_since: checkpoint.Reader | None) -> None:
    """Write ``config.yaml``; if it changes, the former one is kept next to it."""
    path, text = folder / "config.yaml", dump_config(config)
    try:
        if changed_since is not None and path.is_file():
            kept = folder / f"config-until-{changed_since.path.name}.yaml"
            if not kept.exists():  # otherwise this is another start from the same checkpoint
                path.replace(kept)
        temporary = folder / ".config.yaml"  # a full disk or a kill leaves no partial config
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s); training goes on", path, error.strerror)


def _check_same_data(
    reader: checkpoint.Reader, saved: Config, config: Config, train: Loader
) -> None:
    if why := other_data(saved, config, reader.state.get("data"), train):
        raise ConfigError(
            f"{why}: mend the data, set another train.output, or resume {reader.path.name} with "
            "--accept-changes"
        )


def record_start(run: Run, resumed_from: str) -> None:
    """Append command, hosts and versions of this start to ``starts.jsonl``; every rank calls it."""
    hosts = gather_objects(hostname())
    if not run.world.is_main:
        return
    packages = ("deepspeed", "timm", "numpy", "safetensors")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "hosts": hosts,
        "resumed_from": resumed_from,
        "restart": restarts()[0],
        "git": git_commit(),
        "versions": {
            "swin_moe": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # includes the build, unlike the metadata
            **{name: version(name) for name in packages},
        },
    }
    try:
        with open_to_append(run.folder / "starts.jsonl") as file:
            file.write(f"{json.dumps(record)}\n".encode())
    except OSError as error:
        log.warning("this start is not recorded in %s: %s", error.filename, error.strerror)


def git_commit() -> str:
    """Return the source's commit, with -dirty if files differ from it; "" outside a work tree."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def step_back(run: Run, passed_over: bool) -> checkpoint.Reader:
    """Choose the checkpoint to roll back to, the same on every rank.

    Args:
        passed_over: set the newest one aside, from which no update succeeded.

    Raises:
        ValueError: no checkpoint is left.
    """
    reader = _chosen(run, partial(_newest, run, passed_over))
    assert reader is not None
    return reader


def _chosen(run: Run, choose: Callable[[], str]) -> checkpoint.Reader | None:
    """Return the checkpoint that rank 0 chooses, or raise its error, on every rank."""
    chosen: str | Exception = ""
    if run.world.is_main:
        try:
            chosen = choose()
        except (ValueError, OSError) as error:  # raised on every rank below
            chosen = error
    chosen = broadcast_object(chosen)
    if isinstance(chosen, Exception):
        raise chosen
    return checkpoint.Reader(Path(chosen)) if chosen else None


def _newest(run: Run, passed_over: bool) -> str:
    found = checkpoint.latest(run.checkpoints)
    if found is not None and passed_over:
        checkpoint.set_aside(found)
        found = checkpoint.latest(run.checkpoints)
    if found is None:
        raise ValueError(
            "faults.nonfinite=rollback: there is no checkpoint left to go back to (set "
            "checkpoint.every_steps, or a lower optimizer.base_lr)"
        )
    return str(found)


def adopt_folder(run: Run, fresh: bool) -> str:
    """Lock the run directory on rank 0, and choose the checkpoint to resume.

    A directory whose run cannot be resumed, or must not (``fresh``), is moved aside.

    Returns:
        path of the checkpoint, "" if there is none.

    Raises:
        ValueError: the directory has other content, or another training runs in it.
    """
    folder = run.folder
    marker = folder / MARKER
    there = folder.iterdir() if folder.exists() and not _is_run(folder) else iter(())
    if other := next((path for path in there if not _may_stay(path)), None):
        raise ValueError(
            f"train.output={plain(folder)} is not empty and was not made by swin-moe (it holds "
            f"{plain(other.name)}): choose another"
        )
    if _is_run(folder):
        _lock(marker)
        checkpoint.clear_partial(run.checkpoints)
        found = None if fresh else checkpoint.latest(run.checkpoints)
        if found is not None:
            checkpoint.set_aside_newer(run.checkpoints, found)
            return str(found)
        if not fresh and not (folder / "metrics.jsonl").exists():
            return ""  # that run logged nothing
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        run.say(f"the earlier run was moved to {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    _lock(marker)
    return ""


def _may_stay(path: Path) -> bool:
    """Return whether a new run may start next to a file: redirected output, or lost+found."""
    if path.name == "lost+found":
        return True
    return path.suffix in (".log", ".out", ".err", ".txt") and path.is_file()


def _is_run(folder: Path) -> bool:
    """Return whether swin-moe made the folder; copies often lack the marker, a hidden file."""
    found = checkpoint.list_checkpoints(folder / "checkpoints")
    return (folder / MARKER).exists() or any((one / "manifest.json").exists() for one in found)


def _lock(marker: Path) -> None:
    """Lock the marker until this process ends, and write this process's name into it.

    Processes of an earlier start get ``_LEAVING`` seconds to end, after a restart ``_PATIENCE``.

    Raises:
        ValueError: another training holds the lock.
    """
    handle = marker.open("a+")
    deadline = time.monotonic() + (_PATIENCE if started_again() else _LEAVING)
    warned = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(handle)
        except OSError as error:  # Lustre mounted without flock, NFS without its lock daemon
            if error.errno not in _NO_LOCKS:
                raise
            log.warning(
                "%s: this file system has no locks (%s); let no second training run in this folder",
                plain(marker.parent), error.strerror,
            )  # fmt: skip
            break
        if time.monotonic() >= deadline:
            raise ValueError(
                f"another training runs in {plain(marker.parent)}{holder}: wait for it, end it, or "
                "set another train.output"
            )
        if not warned:
            log.warning("waiting for the training that runs in %s%s", plain(marker.parent), holder)
            warned = True
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # on a full disk a later start cannot name this process
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {hostname()}\n")
        handle.flush()
    held_locks.append(handle)


def _holder(handle: IO[str]) -> str:
    """Return the name in the marker, in brackets, or ""."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        handle.seek(0)
        if name := handle.read(300).strip():
            return f" ({plain(name)})"
    return ""


def keep_former_defaults(run: Run, config: Config, fresh: bool) -> None:
    """Keep the defaults with which the run began, for keys that the config does not state.

    For example, weights trained with a gate before the norm are useless with one after it.
    """
    saved = None if fresh else _last_config(run)
    if saved is None or saved.model.name != config.model.name:
        return
    kept = []
    for section, keys in FORMER.get(config.model.name, {}).items():
        then, now = getattr(saved, section), getattr(config, section)
        for key, former in keys.items():
            if key not in now.model_fields_set and getattr(then, key) == former:
                if former != getattr(now, key):
                    kept.append(f"{section}.{key}={str(former).lower()}")
                setattr(now, key, former)
    if kept:
        run.say(
            f"as when the run began: {' '.join(kept)} (the defaults of {config.model.name} have "
            "changed since; a key that you state wins)"
        )


def _last_config(run: Run) -> Config | None:
    """Return the newest readable config of the run's checkpoints."""
    for path in checkpoint.list_checkpoints(run.checkpoints):
        try:
            return load_config(path / "config.yaml")
        except ValueError:  # the resume reports the error
            continue
    return None


def check_same_model(reader: checkpoint.Reader, saved: Config, config: Config) -> None:
    """Check that task and model are the checkpoint's; everything else may change.

    Raises:
        ConfigError: they are not.
    """
    if saved.task.name != config.task.name:
        raise ConfigError(
            f"task.name={config.task.name}, but the checkpoint {reader.path} was trained with "
            f"{saved.task.name}: set another train.output, and model.pretrained={reader.path} to "
            "start from its weights"
        )
    for section in ("model", "moe"):
        old, new = getattr(saved, section).model_dump(), getattr(config, section).model_dump()
        shape_keys = [key for key in new if old[key] != new[key] and key in _SHAPE_KEYS]
        if shape_keys:
            key = shape_keys[0]
            way = ""
            if key in ("blocks", "num_experts") and not saved.moe.enabled:
                way = "; `swin-moe convert --upcycle` turns a dense model into a mixture of experts"
            raise ConfigError(
                f"{section}.{key}={new[key]!r}, but the checkpoint {reader.path} was trained with "
                f"{old[key]!r}: change it back, set another train.output, or use --fresh{way}"
            )

    old_windows, new_windows = built_windows(saved.model), built_windows(config.model)
    if old_windows != new_windows:
        raise ConfigError(
            f"model.window_size and model.img_size give windows {new_windows}, but the checkpoint "
            f"{reader.path} has {old_windows}: change them back, or start another run from it by "
            "model.pretrained"
        )


_SHAPE_KEYS = {
    "family", "patch_size", "in_chans", "num_classes", "embed_dim", "depths", "num_heads",
    "mlp_ratio", "mlp_fc2_bias", "qkv_bias", "ape", "patch_norm", "extra_norm_every_n_blocks",
    "pretrained_window_sizes", "blocks", "num_experts", "num_shared_experts", "routing", "router",
    "cosine_router_dim", "slots_per_expert", "fc2_bias",
}  # fmt: skip


def log_to_file(path: Path) -> None:
    """Log all messages of this rank to ``path`` as well."""
    with contextlib.suppress(OSError):  # the first log line reports it
        path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path)
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.DEBUG)
