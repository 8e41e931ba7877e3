"""Writing during the training: a copy to host memory, which a thread writes to disk.

If the host has no room for the copy, this rank's file is written at once, and the training waits.

No rank waits for another. Each writes its own file and then ``rank-<n>.json``, or
``rank-<n>.failed`` with the reason. Rank 0's thread waits for all of them, writes the manifest and
renames the folder. That needs a file system that all ranks share, as loading does, and no further
communication.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import RunRemoved
from ..common.host import free_memory
from ..common.ranks import local_world_size
from ..common.text import plain, reason
from ..common.writing import replacing
from ..distributed import World, all_reduce_, broadcast_object, rng_state
from ..distributed.expert_placement import ExpertLayout
from ..distributed.watchdog import Writing
from .folder import (
    CLASSES,
    CheckpointError,
    discard,
    file_digest,
    prune,
    rank_file,
    sync,
    write_manifest,
)
from .fragments import Entry, Fragment, describe, from_json, key, merge, to_json
from .reader import RNG
from .stream import stream_file, write_file

log = logging.getLogger("swin_moe")

_POLL = 0.05  # seconds between looks for the other ranks' files
_ROOM = 0.5  # of the free memory; the copy stays allocated, and the training needs some


@dataclass
class Saved:
    """The result of a save.

    Attributes:
        step: of the training.
        path: of the checkpoint.
        stall: seconds that the training waited.
        seconds: from the beginning to the end of the write.
        bytes: of all files.
        error: one line, empty if the checkpoint is complete.
    """

    step: int
    path: Path
    stall: float = 0.0
    seconds: float = 0.0
    bytes: int = 0
    error: str = ""


@dataclass
class _Save:
    """One save of this rank, as it is passed to the thread."""

    saved: Saved
    partial: Path
    tensors: dict[str, Tensor]
    entries: dict[str, Entry]
    texts: dict[str, str]
    keep_last: int
    best: Path | None
    problem: Exception | None = None  # of a file that is written already
    started: float = field(default_factory=time.monotonic)
    abandoned: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread = field(default_factory=threading.Thread)


class Writer:
    """A writer of a run's checkpoints, one at a time; every rank makes the same calls.

    Args:
        folder: of the checkpoints.
        world: of this rank.
        report: called on rank 0, by a method of this class, after each save, even a failed one.
        writing: receives the file that is being written, for the watchdog.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        report: Callable[[Saved], None],
        writing: Writing | None = None,
    ) -> None:
        self.folder, self.world, self._report = folder, world, report
        self.writing = writing or Writing()
        self._of_a_run = folder.parent.is_dir()  # otherwise the first save makes it
        # It distinguishes the files of this run's processes.
        self._life = broadcast_object(secrets.token_hex(4))
        self._host: dict[str, Tensor] = {}
        self._job: _Save | None = None
        self._failed = False  # the last save; set on rank 0 only

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        layout: ExpertLayout,
        *,
        state: dict[str, Any],
        config_text: str,
        class_names: list[str] | None = None,
        keep_last: int = 1,
        best_step: int | None = None,
        size: int = 0,
    ) -> None:
        """Begin to write ``step-<step>``, after the former save has ended.

        Args:
            step: of the training.
            fragments: of this rank.
            layout: of the experts.
            state: position and metrics, for ``state.json``.
            config_text: for ``config.yaml``.
            class_names: for ``classes.json``, by label.
            keep_last: see :func:`.folder.prune`, which follows the write.
            best_step: of the best checkpoint, which is kept.
            size: bytes of the fragments, which decide whether there is room for a copy.
        """
        started = time.monotonic()
        self.wait()
        saved = Saved(step, self.folder / f"step-{step:08d}")
        partial = self.folder / f"partial-{saved.path.name}-{self._life}"
        self.writing.what = f"the save of step {step}"
        self.writing.on(partial / rank_file(self.world.rank))
        copies = bool(self._host) or size < _ROOM * free_memory() / local_world_size()
        tensors: dict[str, Tensor] = {}
        problem: Exception | None = None
        if copies:
            tensors, entries = self._stage(fragments, layout)
        else:
            entries, problem = self._write_at_once(partial, fragments, layout)
        texts = {}
        if self.world.is_main:
            text = json.dumps({"step": step, **state}, indent=1)
            texts = {"config.yaml": config_text, "state.json": text}
            if class_names is not None:
                texts[CLASSES] = json.dumps(class_names)
        best = None if best_step is None else self.folder / f"step-{best_step:08d}"
        job = _Save(saved, partial, tensors, entries, texts, keep_last, best, problem, started)
        # Not a daemon: the program waits for it at the end.
        job.thread = threading.Thread(target=self._write, args=(job,), name=f"save-{step}")
        self._job = job
        job.thread.start()
        saved.stall = time.monotonic() - started

    def poll(self) -> None:
        """Report the running save if it has ended by now.

        Raises:
            RunRemoved: the run directory is gone.
        """
        self.check_folder()
        job = self._job
        if self.world.is_main and job is not None and not job.thread.is_alive():
            self._end(job)

    def _end(self, job: _Save) -> None:
        self._job = None
        self._failed = bool(job.saved.error)
        if not self._failed:
            self.writing.good = str(job.saved.path)
        self._report(job.saved)

    def wait(self) -> bool:
        """Wait for the running save, if any, and report it; every rank must call this.

        Returns:
            whether the last save is complete, the same on every rank.
        """
        job, error = self._job, ""
        if not self.world.is_main:
            error = self._join()
        # Rank 0 waits for the others' files and must learn of a rank that writes none.
        failed = torch.tensor([float(bool(error)) * (self.world.rank + 1)])
        culprit = int(all_reduce_(failed.to(self.world.device), "max").item()) - 1
        if self.world.is_main and job is not None:
            if culprit > 0:
                time.sleep(2 * _POLL)  # for its `.failed` file with the reason
                job.abandoned.set()
            self._join()
            self._end(job)
        self._job = None
        failed = torch.tensor([float(self._failed)]).to(self.world.device)
        complete = not all_reduce_(failed, "max").item()
        if complete and job is not None:
            self.writing.good = str(job.saved.path)
        return complete

    def close(self, patience: float = 10.0) -> None:
        """Finish this rank's part, on a rank that fails alone, for ranks that finish theirs."""
        if self._job is not None:
            self._job.thread.join(patience)
            self._job.abandoned.set()

    def _join(self) -> str:
        job = self._job
        if job is None:
            return ""
        job.thread.join()
        return job.saved.error

    def _stage(
        self, fragments: Iterable[Fragment], layout: ExpertLayout
    ) -> tuple[dict[str, Tensor], dict[str, Entry]]:
        """Copy this rank's part to host memory, which stays allocated between saves."""
        entries: dict[str, Entry] = {}
        staged: dict[str, Tensor] = {}
        for fragment in fragments:
            entries[fragment.name] = describe(fragment, self.world.rank, layout)
            self.writing.on(self.writing.file)
            for kind, values in fragment.values.items():
                staged[key(fragment.name, kind)] = self._to_host(key(fragment.name, kind), values)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return staged | {RNG + name: t.clone() for name, t in rng_state().items()}, entries

    def _write_at_once(
        self, partial: Path, fragments: Iterable[Fragment], layout: ExpertLayout
    ) -> tuple[dict[str, Entry], Exception | None]:
        """Write this rank's file without a copy; return an error for the thread to report."""
        entries: dict[str, Entry] = {}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for fragment in fragments:
                entries[fragment.name] = describe(fragment, self.world.rank, layout)
                for kind, values in fragment.values.items():
                    yield key(fragment.name, kind), values
            yield from ((RNG + name, state) for name, state in rng_state().items())

        log.info("no room in memory for a copy of the checkpoint: training waits for its write")
        try:
            self._make(partial)
            file = partial / rank_file(self.world.rank)
            stream_file(tensors(), file, lambda: self.writing.on(file))
        except (OSError, RunRemoved) as error:
            return entries, error
        return entries, None

    def check_folder(self) -> None:
        """Raise ``RunRemoved`` if the run directory was removed or moved."""
        try:
            gone = self._of_a_run and not self.folder.parent.is_dir()
        except OSError:  # a failing file server is no removal
            gone = False
        if gone:
            raise RunRemoved(
                f"the run directory {self.folder.parent} was removed while the training ran, "
                "with its checkpoints: put it back, or start again from the beginning"
            )

    def _make(self, partial: Path) -> None:
        """Make the folder of a checkpoint, but not that of the run."""
        self.check_folder()
        partial.mkdir(parents=True, exist_ok=True)

    def _to_host(self, name: str, values: Tensor) -> Tensor:
        target = self._host.get(name)
        if target is None or target.shape != values.shape:
            pin = values.device.type == "cuda"
            target = torch.empty(values.shape, dtype=values.dtype, pin_memory=pin)
            self._host[name] = target
        return target.copy_(values.detach(), non_blocking=True)

    # ----------------------------------------------------------------------------------------
    # In the thread

    def _write(self, job: _Save) -> None:
        try:
            self._write_part(job)
            if self.world.is_main:
                self._commit(job)
        except Exception as error:
            job.saved.error = _reason(error, self.writing.file)
            log.debug("save of %s failed", job.saved.path, exc_info=True)
            if self.world.is_main:
                shutil.rmtree(job.partial, ignore_errors=True)
        job.saved.seconds = time.monotonic() - job.started
        self.writing.what = ""

    def _write_part(self, job: _Save) -> None:
        """Write this rank's file and its description, or the reason for a failure."""
        rank = self.world.rank
        try:
            self._make(job.partial)
            file = job.partial / rank_file(rank)
            if job.problem is not None:
                raise job.problem
            on = self.writing.on
            on(file)
            if job.tensors:
                write_file(job.tensors, file, lambda: on(file))
            with contextlib.suppress(PermissionError):  # a file system without modes
                file.chmod(job.partial.stat().st_mode & 0o666)  # readable by others than its owner
            sync(file)
            on(file)
            files = {file.name: file_digest(file)}
            for name, text in job.texts.items():
                on(job.partial / name)
                (job.partial / name).write_text(text, encoding="utf-8")
                sync(job.partial / name)
                files[name] = file_digest(job.partial / name)
            part = json.dumps({"files": files, "tensors": to_json(job.entries)})
            _write_whole(job.partial / f"rank-{rank}.json", part)
        except Exception as error:
            text = _reason(error, self.writing.file)
            try:
                (job.partial / rank_file(rank)).unlink(missing_ok=True)  # room for the reason
                _write_whole(job.partial / f"rank-{rank}.failed", text)
            except OSError:
                log.debug("not even the reason could be written")
            raise

    def _commit(self, job: _Save) -> None:
        """Wait for every rank's part, check that they are complete, and rename the folder."""
        parts = [self._await_part(job, rank) for rank in range(self.world.size)]
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        entries = merge(from_json(part["tensors"]) for part in parts)
        self.writing.on(job.partial / "manifest.json")
        write_manifest(job.partial, files, to_json(entries))
        for rank in range(self.world.size):
            (job.partial / f"rank-{rank}.json").unlink()
        for path in (job.partial / "manifest.json", job.partial):
            sync(path)
        self.writing.on(job.saved.path)
        if job.saved.path.exists():  # a damaged one that the resume ignored
            discard(job.saved.path)
        job.partial.rename(job.saved.path)
        sync(self.folder)
        job.saved.bytes = sum(entry["bytes"] for entry in files.values())
        prune(self.folder, job.keep_last, job.best)

    def _await_part(self, job: _Save, rank: int) -> dict[str, Any]:
        done, failed = (job.partial / f"rank-{rank}.{end}" for end in ("json", "failed"))
        self.writing.on(done)
        while not done.exists():
            if failed.exists():
                raise CheckpointError(f"rank {rank}: {failed.read_text('utf-8')}")
            if job.abandoned.wait(_POLL):
                raise CheckpointError(f"rank {rank} did not write its part")
        part: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return part


def _write_whole(path: Path, text: str) -> None:
    """Write a file that appears with all its content or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _reason(error: Exception, file: str) -> str:
    """Return an error in one line: for the system's errors, the cause and the file.

    Args:
        file: being written; the errors of writes have no file name.
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({plain(error.filename or file)})"
    # The form of the system's errors in safetensors' messages.
    quoted = re.search(r'message: "(.+?)"', str(error))
    return quoted[1] if quoted else reason(error)
