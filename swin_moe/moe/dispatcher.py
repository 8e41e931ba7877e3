"""Exchange rows between the ranks that hold the tokens and those that hold the experts.

Every rank knows from the schedule how many rows each rank sends to each, so that queues and token
counts may be uneven, or empty. Every rank takes part in every collective, even if it has no rows to
send.

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
from torch import Tensor
from torch.profiler import record_function

from .all_to_all import AllToAll, Pending
from .plan import Kernels
from .schedule import Schedule

Experts = Callable[[Tensor, Tensor], Tensor]


class TokenDispatcher:
    """The exchange of a plan's rows with the experts of all ranks, there and back.

    A packed plan sends no fill rows. A padded plan sends all rows, empty ones too: its queues have
    one length, which the host knows without a copy from the device. For a packed (dropless) plan on
    CUDA the host waits for the device once, to read the lengths.

    Attributes:
        waited: seconds that this rank's host waited for other ranks in the forward pass. On CUDA a
            wait blocks the stream and not the host: only an exchange of lengths is counted.
    """

    def __init__(self, schedule: Schedule, kernels: Kernels) -> None:
        self.schedule, self.kernels = schedule, kernels
        self.waited = 0.0

    def run(self, rows: Tensor, experts: Experts) -> Tensor:
        """Apply ``experts(rows, used)`` of all ranks to rows [S, D]; return rows [S, D]."""
        if torch.is_grad_enabled() and not rows.requires_grad:
            # Otherwise this rank would exchange no gradients where another one does.
            rows = rows.detach().requires_grad_()
        maps, shards = self.schedule.leaving, self.schedule.shards
        if maps is None:
            return self._travel(rows, experts)
        returned = self._travel(maps.apply(rows, self.kernels), experts)
        if shards == 1:
            return maps.invert(returned, self.kernels)
        # The shards' parts, summed in fp32.
        ones = torch.ones(maps.destination.shape, device=rows.device)
        return self.kernels.combine(returned, ones, *maps)

    def _travel(self, rows: Tensor, experts: Experts) -> Tensor:
        schedule, size = self.schedule, rows.shape[0]
        out, home = Ferry(schedule.chunks, size), Ferry(schedule.chunks, size)
        returned = []
        for c, ticket in enumerate(_Leave.apply(rows, out)):
            chunk, order, used = (
                _Arrive.apply(ticket, out, c),
                schedule.arrived[c],
                schedule.used[c],
            )
            if order is None:
                chunk = experts(chunk, used)
            else:
                chunk = experts(order.apply(chunk, self.kernels), used)
                chunk = order.invert(chunk, self.kernels)
            returned.append(_Return.apply(chunk, home, c))
        rows = _Home.apply(home, *returned)
        self.waited += out.waited + home.waited
        return rows


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
