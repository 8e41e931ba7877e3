"""Carry rows between the ranks that own the tokens and those that own the experts.

How long each rank's queues are travels first, host to host, so that every rank knows who sends how
many rows to whom: uneven queues, uneven token counts and ranks without any token need nothing else.
Every rank takes part in every collective, whatever it has to send.

The rows may be cut into chunks (a part of each queue): while one is computed the next one travels,
and in the backward pass the same. The order of a pass is then

    send 0 … n−1;  for each chunk: await it, experts, send home;  await all

with one autograd node per step. The engine runs nodes in the reverse of the order in which they
were made, as soon as they are ready: that is the same pipeline with the gradients, and the same
order of collectives on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ..distributed import Group
from .all_to_all import AllToAll, Pending
from .plan import DispatchPlan, Kernels

Experts = Callable[[Tensor, Tensor], Tensor]
Maps = tuple[Tensor, Tensor]  # source and destination of ops.moe_dispatch


class TokenDispatcher:
    """The way of a plan's rows to the experts of all ranks, and back.

    Rows that only fill up a packed plan do not travel. Of a padded plan all rows do, empty or not:
    its queues have one length, which the host knows without asking the device. For a packed plan
    on CUDA (a dropless one) the host waits for the device once, to read the lengths.

    Args:
        degree: chunks, 1 = no overlap.

    Attributes:
        waited: seconds that this rank's host waited for other ranks, in the forward pass. On CUDA
            a wait holds the stream and not the host: there it is the exchange of lengths alone.
    """

    def __init__(self, plan: DispatchPlan, group: Group, kernels: Kernels, degree: int = 1) -> None:
        self.kernels, self.degree = kernels, degree
        self.device = plan.used.device
        experts = plan.used.numel()
        mine = torch.full((experts,), plan.stride) if plan.stride else plan.used.cpu()
        began = time.perf_counter()
        gathered = mine.new_empty(group.size * experts)
        with record_function("all-to-all"):
            dist.all_gather_into_tensor(gathered, mine, group=group.handle)
        self.waited = time.perf_counter() - began
        lengths = gathered.view(group.size, experts)
        # Chunk c of a queue of n rows: [n·c/degree, n·(c+1)/degree).
        cuts = lengths[..., None] * torch.arange(degree + 1) // degree
        # Which expert each rank's places hold; if experts are sharded, several ranks hold one.
        self.shards = max(group.size // experts, 1)
        places = torch.arange(experts * self.shards).view(group.size, -1) // self.shards
        traffic = cuts.diff()[:, places]  # [W from, W to, E_local, degree]
        counts = traffic.sum(2)
        self.chunks = [AllToAll(counts[..., c], group) for c in range(degree)]
        self.order = self._order_to_send(cuts[group.rank], places)
        self.used, self.orders = self._order_arrived(traffic[:, group.rank])

    def _order_to_send(self, cuts: Tensor, places: Tensor) -> Tensor | None:
        """The order from queue by queue (None: that is it) to chunk by chunk, rank by rank.

        Returns:
            [rows · shards] of row · shards + shard: each row goes to all shards of its expert.
        """
        if self.degree == 1 and self.shards == 1:
            return None
        rows = cuts[:, -1]
        first = (rows.cumsum(0) - rows)[:, None] + cuts[:, :-1]  # [E, degree]
        shard = torch.arange(places.shape[0])[:, None] % self.shards
        first = first[places].permute(2, 0, 1) * self.shards + shard  # [degree, W, E_local]
        length = cuts.diff()[places].permute(2, 0, 1)
        return _runs(first, length, self.device, step=self.shards)

    def _order_arrived(self, traffic: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """What is known of the rows that come here, from their traffic [W, E_local, degree].

        Returns:
            rows of each chunk per expert, [degree, E_local]; for each chunk the order from rank by
            rank (None: that is it) to expert by expert, [rows].
        """
        used = traffic.sum(0).t().contiguous().to(self.device, non_blocking=True)
        orders: list[Tensor | None] = [None] * self.degree
        if traffic.shape[1] > 1:
            for c, length in enumerate(traffic.unbind(2)):
                first = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
                orders[c] = _runs(first.t(), length.t(), self.device)
        return used, orders

    def run(self, rows: Tensor, experts: Experts) -> Tensor:
        """Rows [S, D] through ``experts(rows, used)`` wherever those are, to rows [S, D]."""
        if torch.is_grad_enabled() and not rows.requires_grad:
            # Or this rank would have no gradients to exchange where another one has.
            rows = rows.detach().requires_grad_()
        if self.order is None:
            return self._travel(rows, experts)
        maps = _maps(self.order, rows.shape[0], self.shards)
        returned = self._travel(self.kernels.dispatch(rows, *maps), experts)
        if self.shards == 1:
            return self.kernels.dispatch(returned, *_inverse(maps))
        ones = torch.ones(maps[1].shape, device=rows.device)  # the shards' parts, summed in fp32
        return self.kernels.combine(returned, ones, *maps)

    def _travel(self, rows: Tensor, experts: Experts) -> Tensor:
        size = rows.shape[0]
        out, home = _Ferry(self.chunks, size), _Ferry(self.chunks, size)
        returned = []
        for c, ticket in enumerate(_Leave.apply(rows, out)):
            chunk, order = _Arrive.apply(ticket, out, c), self.orders[c]
            if order is None:
                chunk = experts(chunk, self.used[c])
            else:
                maps = _maps(order, chunk.shape[0])
                chunk = experts(self.kernels.dispatch(chunk, *maps), self.used[c])
                chunk = self.kernels.dispatch(chunk, *_inverse(maps))
            returned.append(_Return.apply(chunk, home, c))
        rows = _Home.apply(home, *returned)
        self.waited += out.waited + home.waited
        return rows


def _runs(first: Tensor, length: Tensor, device: torch.device, step: int = 1) -> Tensor:
    """[Σ length] int64: ``length`` numbers from ``first`` on, run after run, in steps."""
    total = int(length.sum())
    length = length.flatten()
    # Only the short tensors cross to the device; what is as long as the rows is made there.
    first = (first.flatten() - (length.cumsum(0) - length) * step).to(device, non_blocking=True)
    length = length.to(device, non_blocking=True)
    run = first.repeat_interleave(length, output_size=total)
    return run + torch.arange(total, device=device) * step


def _maps(order: Tensor, size: int, choices: int = 1) -> Maps:
    """Row maps of the op that brings ``size`` rows, each ``choices`` times, into an order."""
    destination = order.new_full((size * choices,), -1)
    destination[order] = torch.arange(order.numel(), device=order.device)
    return order.to(torch.int32), destination.view(size, choices).to(torch.int32)


def _inverse(maps: Maps) -> Maps:
    """Of maps with one choice."""
    source, destination = maps
    return destination[:, 0], source[:, None]


# --------------------------------------------------------------------------------------------
# One direction of a pass, as autograd sees it


class _Ferry:
    """Chunks on their way: out from one tensor of ``size`` rows, and home into such a one.

    What a forward pass does with one the backward pass undoes with the same one: if rows went out
    with it, their gradients come home with it.
    """

    def __init__(self, chunks: list[AllToAll], size: int) -> None:
        self.chunks, self.size = chunks, size
        self.pending: dict[int, tuple[Pending, Tensor]] = {}
        self.buffer: Tensor | None = None
        self.waited = 0.0

    def leave(self, rows: Tensor, order: range) -> None:
        """Send the chunks of rows [size, D], what is beyond them left out."""
        parts = rows.detach().contiguous().split(self._sizes())
        for c in order:
            arriving = rows.new_empty((self.chunks[c].received, *rows.shape[1:]))
            self.pending[c] = self.chunks[c].start(parts[c], arriving), arriving

    def arrive(self, c: int) -> Tensor:
        """Wait for chunk c of all ranks."""
        return self._wait(c)

    def go_home(self, c: int, chunk: Tensor) -> None:
        """Send chunk c back to all ranks."""
        sizes = self._sizes()
        if self.buffer is None:
            self.buffer = chunk.new_empty((self.size, *chunk.shape[1:]))
            self.buffer[self.size - sizes[-1] :].zero_()
        part = self.buffer.split(sizes)[c]
        self.pending[c] = self.chunks[c].start(chunk.detach(), part, back=True), part

    def home(self) -> Tensor:
        """Wait for all chunks that come home."""
        for c in list(self.pending):
            self._wait(c)
        buffer, self.buffer = self.buffer, None
        assert buffer is not None
        return buffer

    def _sizes(self) -> list[int]:
        sizes = [chunk.sent for chunk in self.chunks]
        return [*sizes, self.size - sum(sizes)]

    def _wait(self, c: int) -> Tensor:
        began = time.perf_counter()
        pending, tensor = self.pending.pop(c)
        with record_function("all-to-all"):
            pending.wait()
        self.waited += time.perf_counter() - began
        return tensor


# Between the node that starts a transfer and the one that awaits it autograd carries a ticket, an
# empty tensor, so that nothing reads or adds up what is still on its way.


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ferry: _Ferry) -> tuple[Tensor, ...]:
        ctx.ferry = ferry
        chunks = range(len(ferry.chunks))
        ferry.leave(rows, chunks)
        return tuple(rows.new_empty(0) for _ in chunks)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor, None]:
        return ctx.ferry.home(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, ferry: _Ferry, c: int) -> Tensor:
        ctx.ferry, ctx.c = ferry, c
        return ferry.arrive(c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.ferry.go_home(ctx.c, grads[0])
        return grads[0].new_empty(0), None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Tensor, ferry: _Ferry, c: int) -> Tensor:
        ctx.ferry, ctx.c = ferry, c
        ferry.go_home(c, chunk)
        return chunk.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ferry.arrive(ctx.c), None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ferry: _Ferry, *tickets: Tensor) -> Tensor:
        ctx.ferry = ferry
        return ferry.home()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chunks = range(len(ctx.ferry.chunks))
        ctx.ferry.leave(grads[0], chunks[::-1])
        return None, *(grads[0].new_empty(0) for _ in chunks)
