"""The order of samples: a pure function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Position = tuple[int, int]  # (epoch, index); index -1 is padding


class ResumableSampler(Sampler[list[Position]]):
    """Batches of ``(epoch, index)`` for one rank, starting anywhere.

    Each epoch has one global order. Global batch ``b`` is its slice ``[b·B·W, (b+1)·B·W)`` for
    batch size B and world size W, and rank r takes the r-th B of that slice: every world size sees
    the same order, and a position is two integers.

    Training shuffles and drops the ragged tail. Evaluation keeps the order of the data set and pads
    the tail with index -1, so that all ranks run equally many batches of one shape.

    Args:
        runs: lengths of the parts that lie together in storage, such as shards.
        window: shuffle the runs, and only so many samples at a time among themselves, so that the
            reads of a while are of a few runs; 0 = shuffle all samples.

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
    ) -> None:
        assert 0 <= rank < world_size
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.training = seed, training
        self.runs = np.array([num_samples]) if runs is None else runs
        self.window = window
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
        """Batches per epoch, the same on every rank."""
        return self._batches

    def set_position(self, epoch: int, batch: int) -> None:
        """Make the next iteration begin at ``batch`` of ``epoch``.

        Raises:
            ValueError: an epoch has fewer batches.
        """
        if not 0 <= batch <= len(self):
            raise ValueError(f"cannot start at batch {batch}: an epoch has {len(self)} batches")
        self._start = (epoch, batch)

    def __iter__(self) -> Iterator[list[Position]]:
        return self._iterate(*self._start)

    def _iterate(self, epoch: int, first: int) -> Iterator[list[Position]]:
        order = self._order(epoch)
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            part = order[start : start + self.batch_size].tolist()
            part += [-1] * (self.batch_size - len(part))
            yield [(epoch, index) for index in part]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.training:
            return np.arange(self.num_samples)
        # Sorting raw bits: NumPy fixes these streams for good, but not Generator.permutation's. The
        # index in the low bits makes them unique and comes back out of a plain sort, which takes a
        # fraction of an argsort's time: 14 million samples are in order within a second.
        keys = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(
            self.num_samples
        )
        low = np.uint64((1 << self.num_samples.bit_length()) - 1)
        if self.window:
            number = self._window_numbers(epoch)
            bits = int(number.max()).bit_length()
            keys = keys >> np.uint64(bits) | number << np.uint64(64 - bits)
        keys &= ~low
        keys |= np.arange(self.num_samples, dtype=np.uint64)
        keys.sort()
        keys &= low
        return keys.view(np.int64)

    def _window_numbers(self, epoch: int) -> np.ndarray:
        """Which window each sample is of [N] uint64, where the runs follow in shuffled order."""
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch, 1]))
        shuffled = np.argsort(bits.random_raw(len(self.runs)), kind="stable")
        ends = np.cumsum(self.runs[shuffled])
        begins = np.empty_like(ends)
        begins[shuffled] = ends - self.runs[shuffled]
        moved = np.repeat(begins - (np.cumsum(self.runs) - self.runs), self.runs)
        return ((np.arange(self.num_samples) + moved) // self.window).astype(np.uint64)
