"""Soft MoE (https://arxiv.org/abs/2308.00951): every slot is a mean of an image's tokens.

No choice is discrete and no token is dropped: the input of each slot is a convex combination of the
image's tokens, and the output of each token is one of the slots' outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MoEConfig
from ..ops import finite_range
from .plan import Kernels, RouteContext, Routing, make_stats


@dataclass(frozen=True)
class SoftPlan:
    """A plan of weights between the n tokens of each of G groups and s slots of each of E experts.

    Attributes:
        finite: [G·n] bool, tokens with finite logits; the others take no part.
        into_slots: [G, n, E·s] in the logits' dtype; each slot's column sums to one.
        out_of_slots: [G, n, E·s] in the logits' dtype; each token's row sums to one.
        used, stride: see :class:`~swin_moe.moe.plan.DispatchPlan`; rows are [E, G, s].
    """

    finite: Tensor
    into_slots: Tensor
    out_of_slots: Tensor
    used: Tensor
    stride: int

    def dispatch(self, tokens: Tensor, kernels: Kernels) -> Tensor:
        """Return the rows [E·G·s, D] of tokens [G·n, D]."""
        weight = self.into_slots.transpose(1, 2).to(tokens.dtype)
        tokens = tokens.masked_fill(~self.finite[:, None], 0.0)  # 0 · NaN would reach every slot
        mixed = torch.bmm(weight, tokens.view(*self.into_slots.shape[:2], tokens.shape[1]))
        return mixed.unflatten(1, (self.used.numel(), -1)).transpose(0, 1).flatten(0, 2)

    def combine(self, rows: Tensor, kernels: Kernels) -> Tensor:
        """Return the tokens [G·n, D] of rows [E·G·s, D]."""
        groups, _, slots = self.out_of_slots.shape
        experts, width = self.used.numel(), rows.shape[1]
        by_group = rows.view(experts, groups, slots // experts, width).transpose(0, 1)
        weight = self.out_of_slots.to(rows.dtype)
        return torch.bmm(weight, by_group.flatten(1, 2)).flatten(0, 1)


def route(logits: Tensor, moe: MoEConfig, context: RouteContext) -> Routing:
    """Route by weights from logits [T, E·s].

    A token with non-finite logits reaches no slot, and its output is 0.
    """
    T, slots = logits.shape
    groups, experts = context.groups, moe.num_experts
    sizes = (groups, T // groups, slots)
    finite = logits.isfinite().all(1)
    bad = ~finite[:, None]
    clean = logits.masked_fill(bad, 0.0)
    # Not −inf: an image without any finite token would give 0/0.
    into = clean.masked_fill(bad, torch.finfo(logits.dtype).min).view(sizes).softmax(1)
    into = into.masked_fill(bad.view(*sizes[:2], 1), 0.0)
    out_of = clean.softmax(1).masked_fill(bad, 0.0)
    rows = groups * slots // experts
    used = torch.full((experts,), rows, dtype=torch.int64, device=logits.device)
    plan = SoftPlan(finite, into, out_of.view(sizes), used, rows)
    by_expert = out_of.detach().view(T, experts, moe.slots_per_expert).sum(2)
    least, greatest = finite_range(logits.detach(), finite)
    stats = make_stats(
        by_expert.sum(0).round().to(torch.int64),
        tokens=T,
        offered=T,
        dropped=(~finite).sum(),
        nonfinite=(~finite).sum(),
        entropy=torch.special.entr(by_expert).sum(),
        least=least,
        greatest=greatest,
    )
    return Routing(plan, logits.new_zeros(()), stats)
