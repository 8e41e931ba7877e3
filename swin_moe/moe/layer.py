"""The Mixture-of-Experts feed-forward layer: five stages around one plain plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..distributed import Group
from . import expert_choice, soft, token_choice
from .balance import ChoiceBias
from .exchange import RaggedExchange
from .experts import Experts, SharedExpert
from .plan import Kernels, Plan, RouteContext, Routing, RoutingStats
from .router import build_router

ROUTINGS = {
    "token_choice": token_choice.route,
    "expert_choice": expert_choice.route,
    "soft": soft.route,
}


class MoEResult(NamedTuple):
    """What a layer returns.

    Attributes:
        output: like the input.
        aux_loss: scalar, the weighted balance losses.
        stats: see :class:`RoutingStats`.
    """

    output: Tensor
    aux_loss: Tensor
    stats: RoutingStats


class MoELayer(nn.Module):
    """Routes tokens through feed-forward experts, ``moe.routing`` says how.

    Args:
        dim: width D of the tokens. hidden_dim: width inside an expert.
        group: expert-parallel group; its ranks hold E / size experts each.
        kernels: the ops of a backend.

    Raises:
        ValueError: the experts cannot be spread evenly over the group.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        moe: MoEConfig,
        group: Group | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__()
        self.group = group or Group()
        if moe.num_experts % self.group.size:
            raise ValueError(
                f"moe.num_experts={moe.num_experts} is not divisible by the expert group's "
                f"{self.group.size} ranks"
            )
        self.dim = dim
        self.moe = moe
        self.kernels = kernels or _default_kernels()
        self.router = build_router(dim, moe)
        num_local = moe.num_experts // self.group.size
        self.experts = Experts(
            num_local,
            self.group.rank * num_local,
            dim,
            hidden_dim,
            self.kernels,
            fc2_bias=moe.fc2_bias,
            drop=moe.drop_rate,
        )
        self.choice_bias: ChoiceBias | None = None
        if moe.bias_update_rate:
            self.choice_bias = ChoiceBias(moe.num_experts, moe.bias_update_rate)
        self.shared: SharedExpert | None = None
        if moe.num_shared_experts:
            self.shared = SharedExpert(dim, moe.num_shared_experts * hidden_dim, moe.drop_rate)

    def forward(self, x: Tensor) -> MoEResult:
        """x [..., D], or [B, H, W, D] where images are routed apart, to a result like x."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"tokens have width {x.shape[-1]}, the layer has {self.dim}")
        tokens = x.reshape(-1, self.dim)
        routing = self.route(tokens, self._groups(x))  # 1 gate, 2 balance
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        rows = routing.plan.dispatch(tokens, self.kernels)  # 3 dispatch
        rows = self._apply_experts(rows, routing.plan)  # 4 experts
        output = routing.plan.combine(rows, self.kernels)  # 5 combine
        if self.shared is not None:
            output = output + self.shared(tokens)
        return MoEResult(output.view_as(x).to(x.dtype), routing.aux_loss, routing.stats)

    def route(self, tokens: Tensor, groups: int = 1, noise: Tensor | None = None) -> Routing:
        """Stages 1 and 2 for tokens [T, D]; ``groups`` runs of them are routed apart."""
        context = RouteContext(
            self.kernels,
            training=self.training,
            groups=groups,
            bias=None if self.choice_bias is None else self.choice_bias(),
            noise=noise,
        )
        return ROUTINGS[self.moe.routing](self.router(tokens), self.moe, context)

    def _groups(self, x: Tensor) -> int:
        if self.moe.routes_images_apart and x.dim() == 4:
            return max(x.shape[0], 1)
        return 1

    def _apply_experts(self, rows: Tensor, plan: Plan) -> Tensor:
        """Rows of all experts, of this rank's tokens, through the experts wherever they are."""
        if self.group.size == 1:
            return self.experts(rows, plan.used, plan.stride)
        exchange = RaggedExchange(plan.used, self.group)
        out = self.experts(exchange.to_experts(rows), exchange.used)
        return exchange.from_experts(out, rows.shape[0])


def _default_kernels() -> Kernels:
    from .backends.fused import KERNELS  # not above: backends are built on this module

    return KERNELS
