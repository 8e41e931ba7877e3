"""Carry rows between token owners and expert owners: all-to-all with autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Group


class _AllToAll(torch.autograd.Function):
    """Rows by rank, ``send`` and ``receive`` giving their counts; backward goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, send: list[int] | None, receive: list[int] | None
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _exchange(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.group, ctx.receive, ctx.send), None, None, None


def _exchange(x: Tensor, group: Group, send: list[int] | None, receive: list[int] | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x) if receive is None else x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x, receive, send, group=group.handle)
    return out


def all_to_all(
    x: Tensor, group: Group, send: list[int] | None = None, receive: list[int] | None = None
) -> Tensor:
    """Exchange the rows of x [S, ...] in the group; without counts in equal parts."""
    return x if group.size == 1 else _AllToAll.apply(x, group, send, receive)


class RaggedExchange:
    """Exchange of packed rows: the queues' own lengths travel first, then the rows.

    Args:
        used: [E] int64, rows of this rank per expert.

    Attributes:
        used: [E_local] int64, rows of all ranks per expert of this rank.
    """

    def __init__(self, used: Tensor, group: Group) -> None:
        self.group = group
        by_rank = used.view(group.size, -1)  # [W, E_local]
        received = torch.empty_like(by_rank)
        dist.all_to_all_single(received, by_rank.contiguous(), group=group.handle)
        self.send: list[int] = by_rank.sum(1).tolist()
        self.receive: list[int] = received.sum(1).tolist()
        self.used = received.sum(0)
        # Rows arrive rank by rank; the experts want them expert by expert.
        local = torch.arange(received.shape[1], device=used.device).expand_as(received)
        self.order = local.reshape(-1).repeat_interleave(received.reshape(-1)).argsort(stable=True)

    def to_experts(self, rows: Tensor) -> Tensor:
        rows = rows[: sum(self.send)]  # the rest is empty
        return all_to_all(rows, self.group, self.send, self.receive)[self.order]

    def from_experts(self, rows: Tensor, size: int) -> Tensor:
        """The way back, to ``size`` rows; the empty ones at the end are zero."""
        by_rank = rows[self.order.argsort()]
        returned = all_to_all(by_rank, self.group, self.receive, self.send)
        return torch.nn.functional.pad(returned, (0, 0, 0, size - returned.shape[0]))
