"""The order of samples: a pure function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from .rng import permutation


class Draw(NamedTuple):
    """A sample of an epoch.

    Attributes:
        place: in the split, −1 for padding.
        repeat: how often the sample was drawn before in the epoch.
    """

    epoch: int
    place: int
    repeat: int = 0


class ResumableSampler(Sampler[list[Draw]]):
    """Batches of :class:`Draw` for one rank, from any position on.

    Each epoch has one global order. Global batch ``b`` is its slice ``[b·B·W, (b+1)·B·W)`` for
    batch size B and world size W, and rank r takes the r-th B of that slice: every world size sees
    the same order, and a position is two integers.

    Training shuffles and drops the ragged tail. Evaluation keeps the order of the data set and pads
    the tail with index -1, so that all ranks run equally many batches of one shape.

    Args:
        runs: lengths of the parts that lie together in storage, such as shards.
        window: shuffle the runs, and then the samples of each window of this many, so that reads
            close in time are of few runs; 0 = shuffle all samples.
        repeats: draw each sample this many times in a row, and 1 / ``repeats`` of the samples per
            epoch, whose length stays: repeated augmentation (https://arxiv.org/abs/1901.09335).

    Raises:
        ValueError: training on fewer samples than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        training: bool,
        runs: np.ndarray | None = None,
        window: int = 0,
        repeats: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.training = seed, training
        self.runs = np.array([num_samples]) if runs is None else runs
        self.window, self.repeats = window, repeats
        self._start = (0, 0)
        global_batch = batch_size * world_size
        if training and num_samples < global_batch:
            raise ValueError(
                f"{num_samples} training samples do not fill one global batch of {batch_size} per "
                f"process × {world_size} processes = {global_batch}: lower data.batch_size"
            )
        whole, rest = divmod(num_samples, global_batch)
        self._batches = whole if training or not rest else whole + 1

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is the same on every rank."""
        return self._batches

    def set_position(self, epoch: int, batch: int) -> None:
        """Make the next iteration begin at ``batch`` of ``epoch``.

        Raises:
            ValueError: an epoch has fewer batches.
        """
        if not 0 <= batch <= len(self):
            raise ValueError(f"cannot start at batch {batch}: an epoch has {len(self)} batches")
        self._start = (epoch, batch)

    @property
    def epoch(self) -> int:
        """The epoch of the current iteration, or of the next one if none is running."""
        return self._start[0]

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._iterate(*self._start)

    def _iterate(self, epoch: int, first: int) -> Iterator[list[Draw]]:
        order = self._order(epoch)
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            samples = [
                Draw(epoch, int(order[place // self.repeats]), place % self.repeats)
                for place in range(start, min(start + self.batch_size, self.num_samples))
            ]
            yield samples + [Draw(epoch, -1)] * (self.batch_size - len(samples))

    def _order(self, epoch: int) -> np.ndarray:
        if not self.training:
            return np.arange(self.num_samples)
        window = self._window_numbers(epoch) if self.window else None
        return permutation(self.num_samples, self.seed, epoch, major=window)

    def _window_numbers(self, epoch: int) -> np.ndarray:
        """Return the window of each sample, [N] uint64, for runs in shuffled order."""
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch, 1]))
        shuffled = np.argsort(bits.random_raw(len(self.runs)), kind="stable")
        ends = np.cumsum(self.runs[shuffled])
        begins = np.empty_like(ends)
        begins[shuffled] = ends - self.runs[shuffled]
        moved = np.repeat(begins - (np.cumsum(self.runs) - self.runs), self.runs)
        return ((np.arange(self.num_samples) + moved) // self.window).astype(np.uint64)
