"""Exchange rows between the ranks that hold the tokens and those that hold the experts.

The ranks first exchange the lengths of their queues, host to host. Every rank then knows how many
rows each rank sends to each, so that queues and token counts may be uneven, or empty. Every rank
takes part in every collective, even if it has no rows to send.

The rows may be cut into chunks (a part of each queue): while the experts compute one, the next one
travels, in the forward and in the backward pass. The order of a pass is then

    send 0 … n−1;  for each chunk: wait for it, experts, send it back;  wait for all

with one autograd node per step. Autograd runs nodes that are ready in the reverse order of their
creation: the backward pass is the same pipeline with gradients, with the same order of collectives
on every rank.
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
    """The exchange of a plan's rows with the experts of all ranks, there and back.

    A packed plan sends no fill rows. A padded plan sends all rows, empty ones too: its queues have
    one length, which the host knows without a copy from the device. For a packed (dropless) plan on
    CUDA the host waits for the device once, to read the lengths.

    Args:
        degree: number of chunks, 1 = no overlap.

    Attributes:
        waited: seconds that this rank's host waited for other ranks in the forward pass. On CUDA a
            wait blocks the stream and not the host: only the exchange of lengths is counted.
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
        # [W, E_local], the expert at each place of each rank; shards of one expert share it.
        self.shards = max(group.size // experts, 1)
        places = torch.arange(experts * self.shards).view(group.size, -1) // self.shards
        traffic = cuts.diff()[:, places]  # [W from, W to, E_local, degree]
        counts = traffic.sum(2)
        self.chunks = [AllToAll(counts[..., c], group) for c in range(degree)]
        self.order = self._order_to_send(cuts[group.rank], places)
        self.used, self.orders = self._order_arrived(traffic[:, group.rank])

    def _order_to_send(self, cuts: Tensor, places: Tensor) -> Tensor | None:
        """Return the order in which rows leave: by chunk, then rank, then queue.

        Returns:
            [rows · shards] of row · shards + shard: each row goes to all shards of its expert.
            None if the rows are in that order already.
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
        """Describe the rows that arrive here.

        Args:
            traffic: [W, E_local, degree], rows from each rank.

        Returns:
            rows of each chunk per expert, [degree, E_local]; for each chunk the order from rank by
            rank to expert by expert, [rows], or None if the two are the same.
        """
        used = traffic.sum(0).t().contiguous().to(self.device, non_blocking=True)
        orders: list[Tensor | None] = [None] * self.degree
        if traffic.shape[1] > 1:
            for c, length in enumerate(traffic.unbind(2)):
                first = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
                orders[c] = _runs(first.t(), length.t(), self.device)
        return used, orders

    def run(self, rows: Tensor, experts: Experts) -> Tensor:
        """Apply ``experts(rows, used)`` of all ranks to rows [S, D]; return rows [S, D]."""
        if torch.is_grad_enabled() and not rows.requires_grad:
            # Otherwise this rank would exchange no gradients where another one does.
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
        out, home = Ferry(self.chunks, size), Ferry(self.chunks, size)
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
    """Return [Σ length] int64: ``length`` numbers from ``first`` on, ``step`` apart, per run."""
    total = int(length.sum())
    length = length.flatten()
    # Only short tensors are copied to the device; tensors as long as the rows are made there.
    first = (first.flatten() - (length.cumsum(0) - length) * step).to(device, non_blocking=True)
    length = length.to(device, non_blocking=True)
    run = first.repeat_interleave(length, output_size=total)
    return run + torch.arange(total, device=device) * step


def _maps(order: Tensor, size: int, choices: int = 1) -> Maps:
    """Return row maps for ``moe_dispatch``: ``size`` rows, each ``choices`` times, in ``order``."""
    destination = order.new_full((size * choices,), -1)
    destination[order] = torch.arange(order.numel(), device=order.device)
    return order.to(torch.int32), destination.view(size, choices).to(torch.int32)


def _inverse(maps: Maps) -> Maps:
    """Invert maps with one choice."""
    source, destination = maps
    return destination[:, 0], source[:, None]


# --------------------------------------------------------------------------------------------
# One direction of a pass, as autograd nodes


class Ferry:
    """Chunks in transit: out of a tensor of ``size`` rows, and home into one.

    The backward pass uses the same object in reverse: if rows left in the forward pass, their
    gradients come home in the backward pass.

    Attributes:
        waited: seconds in :meth:`wait`.
    """

    def __init__(self, chunks: list[AllToAll], size: int) -> None:
        self.chunks, self.size = chunks, size
        self.pending: dict[int, tuple[Pending, Tensor]] = {}
        self.buffer: Tensor | None = None
        self.waited = 0.0

    def leave(self, rows: Tensor, order: range) -> None:
        """Send the chunks of rows [size, D], without the fill rows at the end."""
        parts = rows.detach().contiguous().split(self._sizes())
        for c in order:
            arriving = rows.new_empty((self.chunks[c].received, *rows.shape[1:]))
            self.pending[c] = self.chunks[c].start(parts[c], arriving), arriving

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
            self.wait(c)
        buffer, self.buffer = self.buffer, None
        assert buffer is not None
        return buffer

    def _sizes(self) -> list[int]:
        sizes = [chunk.sent for chunk in self.chunks]
        return [*sizes, self.size - sum(sizes)]

    def wait(self, c: int) -> Tensor:
        """Wait for chunk c of all ranks."""
        began = time.perf_counter()
        pending, tensor = self.pending.pop(c)
        with record_function("all-to-all"):
            pending.wait()
        self.waited += time.perf_counter() - began
        return tensor


# Autograd connects the node that starts a transfer and the one that waits for it by a ticket, an
# empty tensor, so that nothing reads rows in transit.


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ferry: Ferry) -> tuple[Tensor, ...]:
        ctx.ferry = ferry
        chunks = range(len(ferry.chunks))
        ferry.leave(rows, chunks)
        return tuple(rows.new_empty(0) for _ in chunks)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor, None]:
        return ctx.ferry.home(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, ferry: Ferry, c: int) -> Tensor:
        ctx.ferry, ctx.c = ferry, c
        return ferry.wait(c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.ferry.go_home(ctx.c, grads[0])
        return grads[0].new_empty(0), None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Tensor, ferry: Ferry, c: int) -> Tensor:
        ctx.ferry, ctx.c = ferry, c
        ferry.go_home(c, chunk)
        return chunk.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ferry.wait(ctx.c), None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ferry: Ferry, *tickets: Tensor) -> Tensor:
        ctx.ferry = ferry
        return ferry.home()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chunks = range(len(ctx.ferry.chunks))
        ctx.ferry.leave(grads[0], chunks[::-1])
        return None, *(grads[0].new_empty(0) for _ in chunks)
