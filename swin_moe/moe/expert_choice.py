"""Experts choose their tokens (https://arxiv.org/abs/2202.09368): even loads by construction.

Each expert takes the tokens of an image that score highest for it, up to its capacity. Its choice
never depends on other images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import MoEConfig
from ..ops import finite_range, fixed, moe_choose
from .plan import RouteContext, Routing, RoutingPlan, expert_capacity, group_size, make_stats
from .token_choice import draw_noise


def route(logits: Tensor, moe: MoEConfig, context: RouteContext) -> Routing:
    """Route by letting each expert choose its tokens within each group.

    Args:
        logits: [T, E], fp32 or wider. A token whose logits are not finite is never chosen.
    """
    T, E = logits.shape[0], fixed(logits.shape[1])
    groups = context.groups
    finite = logits.isfinite().all(1)
    clean = logits.masked_fill(~finite[:, None], 0.0)
    noise = draw_noise(clean, moe, context)
    noisy = clean if noise is None else clean + noise
    scores = noisy.sigmoid() if moe.score == "sigmoid" else noisy.softmax(1)
    factor = moe.capacity_factor if context.training else moe.eval_capacity_factor
    factor = factor or moe.capacity_factor
    own = group_size(T, groups)
    capacity = min(own, expert_capacity(own, E, moe.top_k, factor))
    source, destination, used = moe_choose(scores, finite, groups, capacity)
    expert = torch.arange(E, device=logits.device).expand(T, E)
    chosen = destination >= 0
    gate = scores * chosen.to(scores.dtype)
    plan = RoutingPlan(
        expert, gate, destination, source, destination, used, used, groups * capacity, capacity
    )
    weight = finite.to(clean.dtype)
    z_sum = (clean.logsumexp(1).square() * weight).sum()
    aux_loss = moe.z_loss_weight * z_sum / max(T, 1)
    probabilities = scores / scores.sum(1, keepdim=True)
    least, greatest = finite_range(logits.detach(), finite)
    stats = make_stats(
        used,
        tokens=T,
        offered=T,
        dropped=(~chosen.any(1)).sum(),
        nonfinite=(~finite).sum(),
        entropy=(torch.special.entr(probabilities).sum(1) * weight).sum(),
        least=least,
        greatest=greatest,
    )
    return Routing(plan, aux_loss, stats)
