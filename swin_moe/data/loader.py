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
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..common.fork_server import die_with_parent
from ..common.ranks import local_world_size
from ..common.text import plain
from ..config import AugmentConfig, Config, DataConfig
from .bad_samples import BadSamples, allowed_bad
from .classes import difference, places_as_labels
from .dataset import Batch, CollateReadable, ImageDataset, Sample, collate
from .files import Source
from .names import alike
from .sampler import Draw, ResumableSampler
from .source import empty_classes, open_source
from .transforms import build_transform

log = logging.getLogger(__name__)

_SHARED = "/dev/shm"
_NO_ROOM, _NO_FILES = 28, 24  # exit codes of a worker that could not hand over a batch
_READY = 2  # batches that each worker makes ahead, as PyTorch has it
TERM_GRACE_S = 60  # workers outlive a SIGTERM for so long


class Loader:
    """Batches of one split for one rank; made by :func:`build_loader`.

    Attributes:
        num_samples: in the whole split, over all ranks.
        class_names: by label, where the data tells.
        classes_seen: how many classes have a sample in the whole split.
        missing_classes: names of those that have none.
        description: one line for the log.
        bad: unreadable samples met so far on this rank.
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
        self._sampler, self._dataset, self._most_bad = sampler, dataset, most_bad
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=CollateReadable(collate) if sampler.training else collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_defer_signals,
            generator=torch.Generator(),  # or each epoch would draw from the global one
        )
        # multiprocessing's own exit hook, which runs later, would send SIGTERM and wait.
        atexit.register(_close, weakref.ref(self))

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self._sampler)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Batches of ``epoch`` from ``start_batch`` on; a new call ends an unfinished former one.

        In training, a readable sample of the same batch stands in for an unreadable one, and others
        of the data set for a batch without any; in evaluation the image is zero and its label −1.
        Each is logged and counted.

        Raises:
            ValueError: ``start_batch`` is beyond the epoch, or in training more samples cannot be
                read than are allowed.
            RuntimeError: a worker process died; :func:`why_died` explains it.
        """
        self._sampler.set_position(epoch, start_batch)
        for batch in self._loader:
            if batch.skipped:
                self.bad.add(batch.skipped)
                batch = self._mended(batch)
            yield batch

    def check_room(self) -> None:
        """Make sure that the workers can hand over their batches.

        To be called before any worker of the run has started: their batches take the same memory.

        Raises:
            ValueError: there is too little shared memory.
        """
        batch = self._sampler.batch_size * math.prod(self._dataset.shape)
        check_shared_memory(self.workers, batch, self.description.partition(":")[0])

    def label(self, index: int) -> int:
        """The label of a sample of the split, without reading it."""
        return int(self._dataset.source.labels[index])

    def keys(self, batch: Batch) -> list[str]:
        """What its samples are called in the data set."""
        return [self._dataset.source.key(index) for index in batch.indices.tolist() if index >= 0]

    def pick(self, indices: Sequence[int]) -> Batch:
        """These samples of the split as a batch, read in this process, in the form of epoch 0."""
        return self._collate([self._dataset[Draw(0, index)] for index in indices])

    def peek(self, batches: int) -> Iterator[Batch]:
        """The first batches of epoch 0, read in this process; the epochs are not touched."""
        self._sampler.set_position(0, 0)
        for positions in itertools.islice(self._sampler, batches):
            batch = self._loader.collate_fn([self._dataset[position] for position in positions])
            yield self._mended(batch) if batch.skipped else batch

    def close(self) -> None:
        """End the worker processes; happens by itself when the program exits."""
        # PyTorch has no public way to end persistent workers.
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _mended(self, batch: Batch) -> Batch:
        nothing = self._sampler.training and len(batch.skipped) == len(batch.valid)
        return self._others(batch) if nothing else batch

    def _others(self, batch: Batch) -> Batch:
        """Replace a batch without readable samples by other samples of the split.

        They are drawn at random, since neighbours are often damaged together. The draw depends only
        on seed, epoch and the batch's own samples, so that a resume takes the same ones.
        """
        epoch, wanted = self._sampler.epoch, len(batch.valid)
        draw = np.random.default_rng([self._dataset.seed, epoch, *batch.indices.tolist()])
        tries = min(self.num_samples, int(self._most_bad) + wanted)
        drawn = draw.choice(self.num_samples, tries, replace=False).tolist()
        samples = (self._dataset[Draw(epoch, place)] for place in drawn)
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
    """More workers than cores or batches only wait; the batches are the same."""
    cores = len(os.sched_getaffinity(0))
    places = (
        (cores, f"this machine has {cores} cores"),
        (batches, f"an epoch has {batches} batches"),
    )
    most, why = min(places)
    if wanted > max(most, DataConfig().num_workers) and say:
        log.warning("data.num_workers=%d: %s, so %d of them work", wanted, why, most)
    return min(wanted, most)


def _defer_signals(_worker: int) -> None:
    """Leave it to the main process what a signal to the whole job means, for a worker that dies
    takes it along. SIGTERM is obeyed after a while: it also ends workers that hang at the exit.
    If the main process is killed, they end too: they hold the lock of its run directory.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_give_up)
    signal.set_wakeup_fd(-1)  # else a signal to a worker would count as one to the main process
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_GRACE_S))


def _give_up(error: Exception, _batch: object) -> None:
    """End a worker that cannot hand a batch over: without it the training would wait for ever."""
    os._exit(_NO_FILES if os.strerror(errno.EMFILE) in str(error) else _NO_ROOM)


def why_died(error: BaseException) -> str:
    """One line, instead of PyTorch's own, about a worker that died; empty for other errors."""
    if not re.match(r"DataLoader worker \(pid", str(error)):  # else it raised an error of its own
        return ""
    told = f"{error.__cause__ or error}"  # which has its exit code or signal
    if "Bus error" in told or f"exit code {_NO_ROOM}" in told:
        free = _free_shared_memory()
        room = "" if free is None else f" ({free / 1e6:.1f} MB are free there)"
        return (
            f"a worker of the data loader found no room for a batch in {_SHARED}{room}: start the "
            "container with a larger --shm-size, or lower data.num_workers or the batch"
        )
    if f"exit code {_NO_FILES}" in told:
        return (
            "a worker of the data loader may open no more files: raise the limit (ulimit -n), or "
            "lower data.num_workers"
        )
    return (
        f"a worker of the data loader died ({told.splitlines()[0]}): the system may have been "
        "short of memory (lower data.num_workers); with data.num_workers=0 an error shows itself"
    )


def check_shared_memory(workers: int, batch: int, split: str) -> None:
    """Make sure that shared memory has room for the batches that workers hold ready.

    Args:
        workers: processes that load for each rank. batch: bytes.

    Raises:
        ValueError: there is too little; without this the workers die or wait for ever.
    """
    ranks = local_world_size()
    needed = batch * workers * _READY * ranks
    free = _free_shared_memory()
    if free is None or needed <= free:
        return
    mine = f"{workers} workers" + f" of each of {ranks} processes" * (ranks > 1)
    raise ValueError(
        f"{split}: {_SHARED} has {free / 1e6:.1f} MB of shared memory free, but data.num_workers="
        f"{workers} may take {needed / 1e6:.1f} MB ({mine}, {_READY} batches of {batch / 1e6:.1f} "
        "MB each): start the container with a larger --shm-size, or lower data.num_workers (0 "
        "needs none) or the batch"
    )


def _free_shared_memory() -> int | None:
    """Bytes; None where workers hand over their batches in another way."""
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
    """Batches of a config's training or held-out split for one rank, see :func:`build_loader`."""
    return build_loader(
        config.data,
        config.augment,
        image_sides=config.model.image_sides,
        in_chans=config.model.in_chans,
        num_classes=config.model.num_classes,
        training=training,
        rank=rank,
        world_size=world_size,
        seed=config.train.seed,
        classes=classes,
        collate=collate,
    )


def build_loader(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    image_sides: tuple[int, int],
    in_chans: int,
    num_classes: int,
    training: bool,
    rank: int,
    world_size: int,
    seed: int,
    classes: list[str] | None = None,
    collate: Callable[[list[Sample]], Batch] = collate,
) -> Loader:
    """Open the training or validation split and prepare its batches for one rank.

    The batches depend on ``seed``, the epoch and the world size, and on nothing else: not on the
    number of workers, and not on where an epoch was resumed.

    Args:
        image_sides: (height, width) in pixels.
        num_classes: labels must lie in [0, num_classes); 0 (a model without a head) allows any.
        classes: names of the model's classes by label: the samples' are matched with them.
        training: shuffle, augment and drop the ragged tail; otherwise keep order and pad it.

    Raises:
        ValueError: one line naming the key, the path and the remedy, for data that cannot be used.
    """
    transform = build_transform(
        augment, image_sides, in_chans, data.mean, training, data.max_pixels
    )
    source = open_source(data, num_classes, training, classes)
    split = data.train if training else data.val
    if rank == 0:
        _tell_of(source, data, num_classes, training, classes)
    sampler = ResumableSampler(
        len(source),
        data.batch_size if training else data.eval_batch_size or data.batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        training=training,
        runs=source.runs,
        window=data.shuffle_window,
        repeats=augment.repeats if training else 1,
    )
    dataset = ImageDataset(source, transform, (*image_sides, in_chans), seed)
    names = source.class_names
    count = len(names) if names else int((source.class_counts > 0).sum())
    unnamed = " without names" * (not names)
    content = f"{len(source):,} samples, {count:,} classes{unnamed}, {source.describe()}"
    workers = _workers(data.num_workers, len(sampler), training and rank == 0)
    return Loader(
        dataset,
        sampler,
        workers,
        f"{split}: {content}",
        allowed_bad(len(source), data.max_bad_share),
        collate,
    )


def _tell_of(
    source: Source,
    data: DataConfig,
    num_classes: int,
    training: bool,
    classes: list[str] | None,
) -> None:
    """Warn of files that are passed over, and of classes that may not be what is meant."""
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
