"""Batches for one rank: from the configuration to tensors, resumable anywhere in an epoch."""

from __future__ import annotations

import atexit
import errno
import itertools
import logging
import math
import multiprocessing.queues
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..common.fork_server import die_with_parent
from ..common.ranks import local_world_size
from ..common.text import plain
from ..config import Config, DataConfig
from .bad_samples import BadSamples, allowed_bad
from .classes import difference, places_as_labels
from .dataset import Batch, ImageDataset, Sample, collate, collate_readable
from .files import Source
from .names import alike
from .sampler import Draw, ResumableSampler
from .source import empty_classes, open_source
from .transforms import build_transform

log = logging.getLogger(__name__)

_SHARED = "/dev/shm"
_NO_ROOM, _NO_FILES = 28, 24  # exit codes of a worker that cannot pass a batch on
_READY = 2  # batches that each worker makes ahead: PyTorch's default
TERM_GRACE_S = 60  # seconds for which workers outlive a SIGTERM


class Loader:
    """Batches of one split for one rank; made by :func:`loader_of`.

    Attributes:
        dataset: the samples.
        sampler: their order on this rank.
        num_samples: in the whole split, over all ranks.
        class_names: by label, None if the data has none.
        classes_seen: number of classes with samples in the whole split.
        missing_classes: names of the classes without samples.
        description: one line for the log.
        bad: the unreadable samples of this rank so far.
        workers: processes that load, 0 = the training's own.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: ResumableSampler,
        num_workers: int,
        description: str,
        most_bad: float,
        collate: Callable[[list[Sample]], Batch] = collate,
    ) -> None:
        self.num_samples = len(dataset.source)
        self.class_names, self.description = dataset.source.class_names, description
        counts = dataset.source.class_counts
        self.classes_seen = int((counts > 0).sum())
        names = enumerate(self.class_names or ())
        self.missing_classes = [n for label, n in names if not counts[label : label + 1].any()]
        self._collate = collate
        self.bad, self.workers = BadSamples(), num_workers
        self.sampler, self.dataset, self._most_bad = sampler, dataset, most_bad
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=partial(collate_readable, collate) if sampler.training else collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_defer_signals,
            generator=torch.Generator(),  # otherwise each epoch draws from the global one
        )
        # multiprocessing's own exit hook, which runs later, sends SIGTERM and waits.
        atexit.register(_close, weakref.ref(self))

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is the same on every rank."""
        return len(self.sampler)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from ``start_batch`` on; end an unfinished former call.

        In training, a readable sample of the same batch replaces an unreadable one; other samples
        of the split replace a batch without any. In evaluation the image is zero and its label −1.
        Each unreadable sample is logged and counted.

        Raises:
            ValueError: ``start_batch`` is beyond the epoch, or in training too many samples are
                unreadable.
            RuntimeError: a worker process died; :func:`why_died` explains it.
        """
        yield from map(self.mend, self.read(epoch, start_batch))

    def read(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of :meth:`epoch` as they are read, for :meth:`mend`."""
        self.sampler.set_position(epoch, start_batch)
        for batch in self._loader:
            if len(batch.valid) != self.sampler.batch_size:  # MoE layers rely on it
                raise ValueError(
                    f"the task made a batch of {len(batch.valid)} samples from "
                    f"{self.sampler.batch_size}: its collate must keep their number"
                )
            yield batch

    def mend(self, batch: Batch) -> Batch:
        """List a batch's unreadable samples; replace a training batch without readable ones."""
        if not batch.skipped:
            return batch
        self.bad.add(batch.skipped)
        return self._mended(batch)

    def check_room(self) -> None:
        """Raise ``ValueError`` if there is too little shared memory for the workers' batches.

        Call it before any worker of the run has started, since their batches take the same memory.
        """
        batch = self.sampler.batch_size * math.prod(self.dataset.shape)
        check_shared_memory(self.workers, batch, self.description.partition(":")[0])

    def label(self, index: int) -> int:
        """Return the label of a sample of the split, without reading it."""
        return int(self.dataset.source.labels[index])

    def keys(self, batch: Batch) -> list[str]:
        """Return the names of a batch's samples in the data set."""
        return [self.dataset.source.key(index) for index in batch.indices.tolist() if index >= 0]

    def pick(self, indices: Sequence[int]) -> Batch:
        """Read these samples of the split as a batch of epoch 0, in this process."""
        return self._collate([self.dataset[Draw(0, index)] for index in indices])

    def peek(self, batches: int) -> Iterator[Batch]:
        """Read the first batches of epoch 0 in this process; running epochs are not affected."""
        self.sampler.set_position(0, 0)
        for positions in itertools.islice(self.sampler, batches):
            batch = self._loader.collate_fn([self.dataset[position] for position in positions])
            yield self._mended(batch) if batch.skipped else batch

    def close(self) -> None:
        """End the worker processes; also called when the program exits."""
        # PyTorch has no public way to end persistent workers.
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _mended(self, batch: Batch) -> Batch:
        nothing = self.sampler.training and len(batch.skipped) == len(batch.valid)
        return self._others(batch) if nothing else batch

    def _others(self, batch: Batch) -> Batch:
        """Replace a batch without readable samples by other samples of the split.

        They are drawn at random, since neighbours are often damaged together. The draw depends only
        on seed, epoch and the batch's own samples, so that a resumed run draws the same.
        """
        epoch, wanted = self.sampler.epoch, len(batch.valid)
        draw = np.random.default_rng([self.dataset.seed, epoch, *batch.indices.tolist()])
        tries = min(self.num_samples, int(self._most_bad) + wanted)
        drawn = draw.choice(self.num_samples, tries, replace=False).tolist()
        samples = (self.dataset[Draw(epoch, place)] for place in drawn)
        found = list(itertools.islice((s for s in samples if s.skipped is None), wanted))
        if not found:
            bad = batch.skipped[0]
            raise ValueError(
                f"none of {tries:,} training images can be read, more than data.max_bad_share "
                f"allows, first {plain(bad.key)} ({plain(bad.reason)})"
            )
        filled = [found[i % len(found)] for i in range(wanted)]
        return self._collate(filled)._replace(skipped=batch.skipped)


def _workers(wanted: int, batches: int, say: bool) -> int:
    """Limit the workers to the number of cores and batches; more would only wait."""
    cores = len(os.sched_getaffinity(0))
    machine, epoch = f"this machine has {cores} cores", f"an epoch has {batches} batches"
    most, why = min((cores, machine), (batches, epoch))
    if wanted > max(most, DataConfig().num_workers) and say:
        log.warning("data.num_workers=%d: %s, so %d of them work", wanted, why, most)
    return min(wanted, most)


def _defer_signals(_worker: int) -> None:
    """Ignore signals to the whole job in a worker, whose death would end the main process.

    SIGTERM is obeyed after ``TERM_GRACE_S``, since it also ends workers that hang at the exit. A
    worker dies with the main process, because it holds the lock of the run directory too.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_give_up)
    signal.set_wakeup_fd(-1)  # otherwise a worker's signal counts as one to the main process
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_GRACE_S))


def _give_up(error: Exception, _batch: object) -> None:
    """End a worker that cannot pass a batch on; the training would wait for ever."""
    os._exit(_NO_FILES if os.strerror(errno.EMFILE) in str(error) else _NO_ROOM)


def why_died(error: BaseException) -> str:
    """Explain in one line why a worker died; return an empty text for other errors."""
    if not re.match(r"DataLoader worker \(pid", str(error)):  # the worker raised its own error
        return ""
    text = f"{error.__cause__ or error}"  # with its exit code or signal
    if "Bus error" in text or f"exit code {_NO_ROOM}" in text:
        free = _free_shared_memory()
        room = "" if free is None else f" ({free / 1e6:.1f} MB are free there)"
        return (
            f"a worker of the data loader found no room for a batch in {_SHARED}{room}: start the "
            "container with a larger --shm-size, or lower data.num_workers or the batch"
        )
    if f"exit code {_NO_FILES}" in text:
        return (
            "a worker of the data loader may open no more files: raise the limit (ulimit -n), or "
            "lower data.num_workers"
        )
    return (
        f"a worker of the data loader died ({text.splitlines()[0]}): the system may have been "
        "short of memory (lower data.num_workers); with data.num_workers=0 an error shows itself"
    )


def check_shared_memory(workers: int, batch: int, split: str) -> None:
    """Raise ``ValueError`` if shared memory lacks room for the batches that workers hold ready.

    Each rank's workers would die or wait for ever. ``batch`` is in bytes.
    """
    ranks = local_world_size()
    needed = batch * workers * _READY * ranks
    free = _free_shared_memory()
    if free is None or needed <= free:
        return
    users = f"{workers} workers" + f" of each of {ranks} processes" * (ranks > 1)
    raise ValueError(
        f"{split}: {_SHARED} has {free / 1e6:.1f} MB of shared memory free, but data.num_workers="
        f"{workers} may take {needed / 1e6:.1f} MB ({users}, {_READY} batches of {batch / 1e6:.1f} "
        "MB each): start the container with a larger --shm-size, or lower data.num_workers (0 "
        "needs none) or the batch"
    )


def _free_shared_memory() -> int | None:
    """Return the free bytes; None where workers pass their batches in another way."""
    try:
        return shutil.disk_usage(_SHARED).free
    except OSError:
        return None


def _close(reference: weakref.ref[Loader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def loader_of(
    config: Config,
    training: bool,
    rank: int = 0,
    world_size: int = 1,
    classes: list[str] | None = None,
    collate: Callable[[list[Sample]], Batch] = collate,
) -> Loader:
    """Open a config's training or held-out split and prepare its batches for one rank.

    The batches depend only on seed, epoch and world size: not on the number of workers, and not on
    where an epoch was resumed.

    Args:
        training: shuffle, augment and drop the ragged tail; otherwise keep the order and pad it.
        classes: names of the model's classes by label; the data's are matched with them.

    Raises:
        ValueError: the data cannot be used; one line naming the key, the path and the remedy.
    """
    data, augment, model = config.data, config.augment, config.model
    sides, channels = model.image_sides, model.in_chans
    transform = build_transform(augment, sides, channels, data.mean, training, data.max_pixels)
    source = open_source(data, model.num_classes, training, classes)
    split = data.train if training else data.val
    if rank == 0:
        _warn_of_classes(source, data, model.num_classes, training, classes)
    sampler = ResumableSampler(
        len(source),
        data.batch_size if training else data.eval_batch_size or data.batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.train.seed,
        training=training,
        runs=source.runs,
        window=data.shuffle_window,
        repeats=augment.repeats if training else 1,
    )
    dataset = ImageDataset(source, transform, (*sides, channels), config.train.seed)
    workers = _workers(data.num_workers, len(sampler), training and rank == 0)
    description = f"{split}: {_content(source)}"
    most_bad = allowed_bad(len(source), data.max_bad_share)
    return Loader(dataset, sampler, workers, description, most_bad, collate)


def _content(source: Source) -> str:
    names = source.class_names
    count = len(names) if names else int((source.class_counts > 0).sum())
    unnamed = " without names" * (not names)
    return f"{len(source):,} samples, {count:,} classes{unnamed}, {source.describe()}"


def _warn_of_classes(
    source: Source,
    data: DataConfig,
    num_classes: int,
    training: bool,
    classes: list[str] | None,
) -> None:
    """Warn of files that are passed over, and of classes that may be a mistake."""
    split = f"data.train={plain(data.train)}" if training else f"data.val={plain(data.val)}"
    if source.passed_over:
        log.warning("%s (%s)", source.passed_over, split)
    notes = []
    if training:
        notes.append(empty_classes(source, num_classes))
        if name := alike(source.class_names or []):
            notes.append(
                f"two classes look alike, '{plain(name)}': if they are one, move their images "
                "into one folder"
            )
    elif data.match_classes == "name":
        split = f"data.path={plain(data.path)}, {split}"
        notes.append(places_as_labels(source) if classes is None else difference(source, classes))
    for note in filter(None, notes):
        log.warning("%s: %s", split, note)
