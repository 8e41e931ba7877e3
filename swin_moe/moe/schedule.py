"""The schedule of an exchange: a pure function of the lengths of all ranks' queues.

The ranks exchange the lengths host to host. The queues of a padded plan have one length, which
depends only on the number of tokens and the config. If all ranks have equally many tokens, they
exchange that length once, and a layer then keeps the schedule: no collective, no copy to the device
and no index is made again.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ..distributed import Group
from .all_to_all import AllToAll
from .plan import DispatchPlan, Kernels


class Maps(NamedTuple):
    """A permutation of rows: source and destination of ``ops.moe_dispatch``."""

    source: Tensor
    destination: Tensor

    def apply(self, rows: Tensor, kernels: Kernels) -> Tensor:
        return kernels.dispatch(rows, *self)

    def invert(self, rows: Tensor, kernels: Kernels) -> Tensor:
        return kernels.dispatch(rows, self.destination[:, 0], self.source[:, None])


class Transposition(NamedTuple):
    """A permutation of rows [ranks · experts · n, D], whose runs have one length: one copy."""

    ranks: int
    experts: int

    def apply(self, rows: Tensor, kernels: Kernels) -> Tensor:
        return self._swap(rows, self.ranks, self.experts)

    def invert(self, rows: Tensor, kernels: Kernels) -> Tensor:
        return self._swap(rows, self.experts, self.ranks)

    def _swap(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        runs = rows.view(outer, inner, rows.shape[0] // (outer * inner), rows.shape[1])
        return runs.transpose(0, 1).reshape(rows.shape)


class Schedule:
    """The way of all rows, in chunks (parts of each queue).

    Args:
        lengths: [W, E] int64 on the host, rows of each rank for each expert.
        size: number of this rank's rows, with fill rows after its queues.
        degree: number of chunks.

    Attributes:
        chunks: the all-to-all of each chunk.
        shards: ranks among which each expert is cut.
        leaving: the order in which rows leave: by chunk, then rank, then queue. Each row goes to
            all shards of its expert. None if the rows are in that order already.
        used: [degree, E_local] int64 on the device, rows of each chunk per expert.
        arrived: for each chunk the order from rank by rank to expert by expert; None if the two are
            the same.
    """

    def __init__(
        self, lengths: Tensor, size: int, group: Group, degree: int, device: torch.device
    ) -> None:
        experts = lengths.shape[1]
        self.size, self.degree, self.device = size, degree, device
        # Chunk c of a queue of n rows: [n·c/degree, n·(c+1)/degree).
        cuts = lengths[..., None] * torch.arange(degree + 1) // degree
        # [W, E_local], the expert at each place of each rank; shards of one expert share it.
        self.shards = max(group.size // experts, 1)
        places = torch.arange(experts * self.shards).view(group.size, -1) // self.shards
        traffic = cuts.diff()[:, places]  # [W from, W to, E_local, degree]
        counts = traffic.sum(2)
        self.chunks = [AllToAll(counts[..., c], group) for c in range(degree)]
        self.leaving = self._order_to_send(cuts[group.rank], places)
        mine = traffic[:, group.rank]  # [W, E_local, degree], rows from each rank
        self.used = mine.sum(0).t().contiguous().to(device, non_blocking=True)
        self.arrived = [self._order_arrived(length) for length in mine.unbind(2)]

    def _order_to_send(self, cuts: Tensor, places: Tensor) -> Maps | None:
        """Order this rank's rows · shards, numbered row · shards + shard."""
        if self.degree == 1 and self.shards == 1:
            return None
        rows = cuts[:, -1]
        first = (rows.cumsum(0) - rows)[:, None] + cuts[:, :-1]  # [E, degree]
        shard = torch.arange(places.shape[0])[:, None] % self.shards
        first = first[places].permute(2, 0, 1) * self.shards + shard  # [degree, W, E_local]
        length = cuts.diff()[places].permute(2, 0, 1)
        order = _runs(first, length, self.device, step=self.shards)
        return _maps(order, self.size, self.shards)

    def _order_arrived(self, length: Tensor) -> Maps | Transposition | None:
        """Order the rows of one chunk; ``length`` [W, E_local] of each rank and expert."""
        ranks, experts = length.shape
        if experts == 1:
            return None
        if bool((length == length[0, 0]).all()):
            return Transposition(ranks, experts)
        first = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
        order = _runs(first.t(), length.t(), self.device)
        return _maps(order, order.numel())


class Schedules:
    """The schedules of one layer's exchanges.

    Args:
        group: of the ranks that exchange.

    Attributes:
        equal_tokens: the caller's promise that in each pass all ranks have equally many tokens.
            Without it the ranks exchange the lengths in each pass, and may have any tokens. If the
            promise is broken in a later pass, ranks may wait for one another until the group's
            time-out.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.equal_tokens = group, False
        self._known: dict[tuple[int, int, int, torch.device], Schedule] = {}

    def find(self, plan: DispatchPlan, size: int, degree: int) -> tuple[Schedule, float]:
        """Return the schedule of a plan with ``size`` rows; every rank must call it.

        Returns:
            the schedule, and the seconds that this rank's host waited for other ranks.

        Raises:
            ValueError: ``equal_tokens`` is not true; all ranks raise it.
        """
        device = plan.used.device
        # Equal numbers of tokens give equal keys: all ranks find theirs, or none does.
        key = (plan.stride, size, degree, device)
        kept = self.equal_tokens and plan.stride > 0
        if kept and key in self._known:
            return self._known[key], 0.0
        with torch.inference_mode(False):  # kept tensors may be saved for a backward pass
            lengths, waited = self._exchange_lengths(plan)
            if kept:
                _check_equal(lengths)
            schedule = Schedule(lengths, size, self.group, degree, device)
        if kept:
            self._known[key] = schedule
        return schedule, waited

    def _exchange_lengths(self, plan: DispatchPlan) -> tuple[Tensor, float]:
        """Return the lengths [W, E] of all ranks' queues, and the seconds waited."""
        experts = plan.used.numel()
        mine = torch.full((experts,), plan.stride) if plan.stride else plan.used.cpu()
        gathered = mine.new_empty(self.group.size * experts)
        began = time.perf_counter()
        with record_function("all-to-all"):
            dist.all_gather_into_tensor(gathered, mine, group=self.group.handle)
        waited = time.perf_counter() - began
        return gathered.view(self.group.size, experts), waited


def _check_equal(lengths: Tensor) -> None:
    first = lengths[:, 0].tolist()
    for rank, length in enumerate(first):
        if length != first[0]:
            raise ValueError(
                "an MoE layer with equal_tokens=True needs equally many tokens on all ranks, but "
                f"its queues have {first[0]} places on rank 0 of the expert group and {length} on "
                f"rank {rank}: use batches of one size, or leave equal_tokens out"
            )


def _runs(first: Tensor, length: Tensor, device: torch.device, step: int = 1) -> Tensor:
    """Return [Σ length] int64: ``length`` numbers from ``first`` on, ``step`` apart, per run."""
    total = int(length.sum())
    length = length.flatten()
    # Only short tensors are copied to the device; tensors as long as the rows are made there.
    first = (first.flatten() - (length.cumsum(0) - length) * step).to(device, non_blocking=True)
    length = length.to(device, non_blocking=True)
    run = first.repeat_interleave(length, output_size=total)
    return run + torch.arange(total, device=device) * step


def _maps(order: Tensor, size: int, choices: int = 1) -> Maps:
    """Return the maps of ``size`` rows, each ``choices`` times, in ``order``; it may lack some."""
    destination = order.new_full((size * choices,), -1)
    destination[order] = torch.arange(order.numel(), device=order.device)
    return Maps(order.to(torch.int32), destination.view(-1, choices).to(torch.int32))
