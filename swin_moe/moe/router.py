"""Routers: tokens to a routing plan and a balance loss, in fp32 throughout."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MoEConfig
from .balance import gshard_loss, importance_load_loss
from .plan import RoutingPlan, expert_capacity, queue_slots


class Routing(NamedTuple):
    """A plan and its balance loss (a scalar, not yet weighted)."""

    plan: RoutingPlan
    balance_loss: Tensor


class LinearRouter(nn.Module):
    """Logits x·Wᵀ in fp32; ``weight`` is [E, dim]."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.trunc_normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, dim] to logits [T, E]."""
        wide = _wide(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


class CosineRouter(nn.Module):
    """Cosine router of Swin-MoE: normalize(Wx)·normalize(M)·exp(min(t, ln 100)).

    Args:
        proj_dim: width of the projection. init_t: initial temperature; t starts at ln(1/init_t).
    """

    def __init__(
        self, dim: int, num_experts: int, proj_dim: int = 256, init_t: float = 0.5
    ) -> None:
        super().__init__()
        self.init_t = init_t
        self.temperature = nn.Parameter(torch.empty(1))
        self.cosine_projector = nn.Linear(dim, proj_dim)
        self.sim_matrix = nn.Parameter(torch.empty(proj_dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What is the router's own; the projection is a Linear layer like others."""
        nn.init.constant_(self.temperature, math.log(1.0 / self.init_t))
        nn.init.normal_(self.sim_matrix, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, dim] to logits [T, E]."""
        wide = _wide(x)
        with torch.autocast(x.device.type, enabled=False):
            projected = self.cosine_projector(x.to(self.cosine_projector.weight.dtype)).to(wide)
            scale = self.temperature.to(wide).clamp(max=math.log(100.0)).exp()
            matrix = F.normalize(self.sim_matrix.to(wide), dim=0)
            return F.normalize(projected, dim=1) @ matrix * scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def build_router(dim: int, moe: MoEConfig) -> nn.Module:
    if moe.router == "cosine":
        return CosineRouter(dim, moe.num_experts, moe.cosine_router_dim, moe.cosine_router_init_t)
    return LinearRouter(dim, moe.num_experts)


def route(
    logits: Tensor, moe: MoEConfig, *, training: bool, noise: Tensor | None = None
) -> Routing:
    """Choose top-k experts per token and queue them.

    Args:
        logits: [T, E], fp32 or wider.
        training: adds the gate noise and uses ``moe.capacity_factor`` instead of the evaluation's.
        noise: [T, E] standard normal draws to use instead of fresh ones.

    Gates are the chosen probabilities; with ``moe.normalize_gate`` they are divided by their sum,
    before anything is dropped. For k = 1 that makes 1, whose gradient would be zero: it is taken as
    that of the probability's logarithm, so that the router still learns from the task.
    """
    T, E = logits.shape
    noisy = logits
    if training and moe.gate_noise > 0:
        noise = torch.randn_like(logits) if noise is None else noise
        noisy = logits + noise * (moe.gate_noise / E)
    scores = noisy.softmax(1)
    # A stable sort, not topk, whose choice among equal scores is not defined.
    expert = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, : moe.top_k]
    gate = scores.gather(1, expert)
    if moe.normalize_gate:
        total = gate.sum(1, keepdim=True).clamp(min=torch.finfo(gate.dtype).eps)
        gate = gate / (total if moe.top_k > 1 else total.detach())
    priority = scores.detach().amax(1) if moe.batch_prioritized else None
    slot, counts = queue_slots(expert, E, priority)
    factor = moe.capacity_factor if training else moe.eval_capacity_factor
    capacity = expert_capacity(T, E, moe.top_k, factor)
    kept = slot < capacity if capacity else torch.ones_like(slot, dtype=torch.bool)
    plan = RoutingPlan(expert, gate.to(logits.dtype), slot, counts, kept, capacity)
    return Routing(plan, _balance_loss(moe, logits, noisy, scores, expert))


def _balance_loss(
    moe: MoEConfig, logits: Tensor, noisy: Tensor, scores: Tensor, expert: Tensor
) -> Tensor:
    if logits.shape[0] == 0 or moe.balance_weight == 0:
        return logits.sum() * 0.0
    if moe.balance == "gshard":
        return gshard_loss(scores, expert)
    return importance_load_loss(logits.softmax(1), noisy.gather(1, expert), moe.gate_noise)
