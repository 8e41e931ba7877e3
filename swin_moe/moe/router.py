"""Routers: compute logits from tokens, in full fp32 or wider."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.wide import ExactLinear, exact_linear
from ..config import MoEConfig


class LinearRouter(nn.Module):
    """A linear router: logits x·Wᵀ; ``weight`` is [E, dim]."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.trunc_normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [T, E] of tokens x [T, dim]."""
        wide = _wide(x)
        with torch.autocast(x.device.type, enabled=False):
            return exact_linear(x.to(wide), self.weight.to(wide))


class CosineRouter(nn.Module):
    """Cosine router of Swin-MoE: normalize(Wx)·normalize(M)·exp(min(t, ln 100)).

    Args:
        proj_dim: width of the projection.
        init_t: initial temperature; t starts at ln(1/init_t).
    """

    def __init__(
        self, dim: int, num_experts: int, proj_dim: int = 256, init_t: float = 0.5
    ) -> None:
        super().__init__()
        self.init_t = init_t
        self.temperature = nn.Parameter(torch.empty(1))
        self.cosine_projector = ExactLinear(dim, proj_dim)
        self.sim_matrix = nn.Parameter(torch.empty(proj_dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise temperature and matrix; the model initialises the projection, a Linear."""
        nn.init.constant_(self.temperature, math.log(1.0 / self.init_t))
        nn.init.normal_(self.sim_matrix, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [T, E] of tokens x [T, dim]."""
        wide = _wide(x)
        with torch.autocast(x.device.type, enabled=False):
            projected = self.cosine_projector(x.to(self.cosine_projector.weight.dtype)).to(wide)
            scale = self.temperature.to(wide).clamp(max=math.log(100.0)).exp()
            matrix = F.normalize(self.sim_matrix.to(wide), dim=0)
            return exact_linear(F.normalize(projected, dim=1), matrix.t()) * scale


class SoftRouter(nn.Module):
    """Router of Soft MoE: scale·normalize(x)·normalize(Φ)ᵀ (https://arxiv.org/abs/2308.00951, 2.3).

    ``weight`` is Φ, [slots, dim]; ``scale`` [1] starts at 1.
    """

    def __init__(self, dim: int, num_slots: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_slots, dim))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [T, slots] of tokens x [T, dim]."""
        wide = _wide(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = F.normalize(self.weight.to(wide), dim=1) * self.scale.to(wide)
            return exact_linear(F.normalize(x.to(wide), dim=1), weight)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def build_router(dim: int, moe: MoEConfig) -> LinearRouter | CosineRouter | SoftRouter:
    if moe.routing == "soft":
        return SoftRouter(dim, moe.num_experts * moe.slots_per_expert)
    if moe.router == "cosine":
        return CosineRouter(dim, moe.num_experts, moe.cosine_router_dim, moe.cosine_router_init_t)
    return LinearRouter(dim, moe.num_experts)
