"""The directory of a run: whose it is, what life in it goes on, and its log files."""

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

MARKER = ".swin_moe"  # in every run directory: nothing else is ever moved or written over
_held: list[IO[str]] = []
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}
_PATIENCE, _LEAVING = 60.0, 10.0  # seconds for the processes of an earlier start to end


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
        """Print a line on rank 0 and put it into this rank's log."""
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
    """Choose the checkpoint to resume from and write ``config.yaml``; the same on every rank.

    Args:
        train: the training data, which must be the checkpoint's.
        accept_changes: resume with other data or classes, too.
    """
    reader = _chosen(run, partial(_adopt, run, fresh))
    changes: list[str] = []
    if reader is not None:
        saved = load_config(reader.path / "config.yaml")
        _check_same_model(reader, saved, config)
        if train is not None and not accept_changes:
            _check_same_data(reader, saved, config, train)
        changes = changed_keys(saved, config)
    log_to_file(run.log_file)
    record_start(run, "" if reader is None else reader.path.name)
    if reader is not None and changes:
        run.say(summary(changes, int(reader.state["step"])))
        log.debug("all changes: %s", ", ".join(changes))
    if run.world.is_main:
        _write_config(run.folder, config, reader if changes else None)
    return reader


def _write_config(folder: Path, config: Config, changed_since: checkpoint.Reader | None) -> None:
    """Write ``config.yaml``; where it changes, the former one stays beside it."""
    path, text = folder / "config.yaml", dump_config(config)
    try:
        if changed_since is not None and path.is_file():
            kept = folder / f"config-until-{changed_since.path.name}.yaml"
            if not kept.exists():  # else this is another start from the same checkpoint
                path.replace(kept)
        temporary = folder / ".config.yaml"  # a full disk or a kill leaves no half of one
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
            "it by --accept-changes"
        )


def record_start(run: Run, resumed_from: str) -> None:
    """Append to ``starts.jsonl`` what this start of the run is made of; every rank calls it."""
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
            "torch": torch.__version__,  # with its build, which metadata lacks
            **{name: version(name) for name in packages},
        },
    }
    try:
        with open_to_append(run.folder / "starts.jsonl") as file:
            file.write(f"{json.dumps(record)}\n".encode())
    except OSError as error:
        log.warning("this start is not recorded in %s: %s", error.filename, error.strerror)


def git_commit() -> str:
    """Commit of the source, with -dirty if files differ from it; empty outside a work tree."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def step_back(run: Run, passed_over: bool) -> checkpoint.Reader:
    """The checkpoint to go back to; the same on every rank.

    Args:
        passed_over: the newest one was tried and leads nowhere: it is set aside.

    Raises:
        ValueError: there is none.
    """
    reader = _chosen(run, partial(_newest, run, passed_over))
    assert reader is not None
    return reader


def _chosen(run: Run, choose: Callable[[], str]) -> checkpoint.Reader | None:
    """What rank 0 chooses, or the error that it meets, on every rank."""
    chosen: str | Exception = ""
    if run.world.is_main:
        try:
            chosen = choose()
        except (ValueError, OSError) as error:  # to be raised on every rank alike
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


def _adopt(run: Run, fresh: bool) -> str:
    """Lock the run directory, move an earlier life aside if need be, choose the checkpoint.

    Returns:
        path of the checkpoint to resume from, empty if there is none.

    Raises:
        ValueError: the directory holds something else, or another training runs in it.
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
            return ""  # it had hardly begun
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        run.say(f"the earlier run was moved to {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    _lock(marker)
    return ""


def _may_stay(path: Path) -> bool:
    """Whether a new run may begin beside this: what was printed to a file, a disk's lost+found."""
    if path.name == "lost+found":
        return True
    return path.suffix in (".log", ".out", ".err", ".txt") and path.is_file()


def _is_run(folder: Path) -> bool:
    """Whether swin-moe made the folder; copies often lack the marker, whose name is hidden."""
    found = checkpoint.list_checkpoints(folder / "checkpoints")
    return (folder / MARKER).exists() or any((one / "manifest.json").exists() for one in found)


def _lock(marker: Path) -> None:
    """Hold the marker as long as this process lives, and write into it who does.

    Processes of an earlier start may need a moment to end; after a restart they have more time.

    Raises:
        ValueError: another training holds it.
    """
    handle = marker.open("a+")
    deadline = time.monotonic() + (_PATIENCE if started_again() else _LEAVING)
    said = False
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
        if not said:
            log.warning("waiting for the training that runs in %s%s", plain(marker.parent), holder)
            said = True
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # a full disk: then a later start cannot name us
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {hostname()}\n")
        handle.flush()
    _held.append(handle)


def _holder(handle: IO[str]) -> str:
    """Who wrote into the marker, in brackets."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        handle.seek(0)
        if name := handle.read(300).strip():
            return f" ({plain(name)})"
    return ""


def keep_former_defaults(run: Run, config: Config, fresh: bool) -> None:
    """Keep a variant's defaults from when the run began, if the config does not state the keys.

    For example, weights trained with a gate before the norm compute nonsense with one after it.
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
    """The config of the newest checkpoint whose config can be read."""
    for path in checkpoint.list_checkpoints(run.checkpoints):
        try:
            return load_config(path / "config.yaml")
        except ValueError:  # the resume reports what is wrong with it
            continue
    return None


def _check_same_model(reader: checkpoint.Reader, saved: Config, config: Config) -> None:
    """The checkpoint's task and model must be the config's; everything else may change."""
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
                way = "; `swin-moe convert --upcycle` makes a mixture of a dense model"
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
    """Send everything that is logged by this rank to ``path`` as well."""
    with contextlib.suppress(OSError):  # the first line reports it
        path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path)
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.DEBUG)
