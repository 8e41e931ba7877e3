"""Tokens choose their experts: top-k with capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import MoEConfig
from ..ops import Route, RouteOptions, fixed
from .balance import balance_loss
from .plan import (
    RouteContext,
    Routing,
    RoutingPlan,
    RoutingStats,
    expert_capacity,
    group_size,
    make_stats,
)


def route(logits: Tensor, moe: MoEConfig, context: RouteContext) -> Routing:
    """Route by choosing the experts of each token, see :func:`swin_moe.ops.moe_route`.

    Args:
        logits: [T, E], fp32 or wider.
    """
    T, E = logits.shape[0], fixed(logits.shape[1])
    training, groups = context.training, context.groups
    top_k = moe.top_k if training else moe.eval_top_k or moe.top_k
    factor = moe.capacity_factor if training else moe.eval_capacity_factor
    options = RouteOptions(
        top_k=top_k,
        sigmoid=moe.score == "sigmoid",
        normalize=moe.normalize_gate,
        prioritized=moe.batch_prioritized,
        groups=groups,
        capacity=expert_capacity(group_size(T, groups), E, top_k, factor) if factor else 0,
        padded=context.padded and factor > 0,
        load_sigma=moe.gate_noise / E if moe.balance == "importance_load" else 0.0,
    )
    noise = draw_noise(logits, moe, context)
    found = context.kernels.route(logits, noise, context.bias, options)
    plan = RoutingPlan(
        *found[:6],
        used=found.used,
        stride=groups * options.capacity if options.padded else 0,
        capacity=options.capacity,
    )
    return Routing(plan, balance_loss(moe, found), _stats(found))


def draw_noise(logits: Tensor, moe: MoEConfig, context: RouteContext) -> Tensor | None:
    """Return gate noise [T, E] with standard deviation gate_noise / E; None in evaluation."""
    if not context.training or moe.gate_noise == 0:
        return None
    noise = torch.randn_like(logits) if context.noise is None else context.noise
    return noise * (moe.gate_noise / moe.num_experts)


def _stats(found: Route) -> RoutingStats:
    _, entropy, least, greatest, nonfinite = found.scalars.detach().unbind()
    tokens, top_k = found.expert.shape
    return make_stats(
        found.counts,
        tokens=tokens,
        offered=tokens * top_k,
        dropped=tokens * top_k - found.used.sum(),
        nonfinite=nonfinite,
        entropy=entropy,
        least=least,
        greatest=greatest,
    )
