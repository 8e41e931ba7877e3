"""The Mixture-of-Experts feed-forward layer: five stages around one plain plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..distributed import Group
from ..ops import (
    moe_combine,
    moe_combine_reference,
    moe_dispatch,
    moe_dispatch_reference,
)
from .dispatch import RaggedExchange, rows_from_experts, rows_to_experts
from .experts import Experts
from .plan import RoutingPlan
from .router import build_router, route


class MoEResult(NamedTuple):
    """What a layer returns; the statistics are device tensors, read only when logged.

    Attributes:
        output: like the input.
        aux_loss: scalar, the balance loss times its weight.
        counts: [E] int64, assignments per expert on this rank, dropped ones included.
        dropped: scalar int64, assignments that found no slot.
    """

    output: Tensor
    aux_loss: Tensor
    counts: Tensor
    dropped: Tensor


class MoELayer(nn.Module):
    """Routes each token to k of E feed-forward experts.

    Args:
        dim: width D of the tokens. hidden_dim: width inside an expert.
        group: expert-parallel group; its ranks hold E / size experts each and must see equal
            numbers of tokens when a capacity factor is set.
    """

    def __init__(
        self, dim: int, hidden_dim: int, moe: MoEConfig, group: Group | None = None
    ) -> None:
        super().__init__()
        self.group = group or Group()
        if moe.num_experts % self.group.size:
            raise ValueError(
                f"moe.num_experts={moe.num_experts} is not divisible by the expert group's "
                f"{self.group.size} ranks"
            )
        self.moe = moe
        num_local = moe.num_experts // self.group.size
        self.router = build_router(dim, moe)
        self.experts = Experts(
            num_local,
            self.group.rank * num_local,
            dim,
            hidden_dim,
            fc2_bias=moe.fc2_bias,
            drop=moe.drop_rate,
        )
        reference = moe.backend == "reference"
        self.dispatch = moe_dispatch_reference if reference else moe_dispatch
        self.combine = moe_combine_reference if reference else moe_combine

    def forward(self, x: Tensor) -> MoEResult:
        """x [..., D] to a result whose output has the shape and dtype of x."""
        tokens = x.reshape(-1, x.shape[-1])
        # 1 gate, 2 balance
        plan, balance_loss = route(self.router(tokens), self.moe, training=self.training)
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        # 3 dispatch, 4 experts, 5 combine
        source, destination = plan.row_index()
        rows = self.dispatch(tokens, source, destination)
        rows = self._apply_experts(rows, plan)
        output = self.combine(rows, plan.gate, source, destination)
        dropped = (~plan.kept).sum()
        aux_loss = self.moe.balance_weight * balance_loss
        return MoEResult(output.view_as(x).to(x.dtype), aux_loss, plan.counts, dropped)

    def _apply_experts(self, rows: Tensor, plan: RoutingPlan) -> Tensor:
        """Rows of all experts, of this rank's tokens, through the experts wherever they are."""
        if plan.capacity:
            grouped = rows_to_experts(rows, self.moe.num_experts, self.group)
            return rows_from_experts(self.experts(grouped), self.group)
        exchange = RaggedExchange(plan.counts, self.group)
        out = self.experts(exchange.to_experts(rows), exchange.rows_per_expert)
        return exchange.from_experts(out)
