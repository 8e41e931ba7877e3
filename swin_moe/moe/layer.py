"""The Mixture-of-Experts feed-forward layer: five stages that share one routing plan."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..distributed import Group
from ..distributed.expert_placement import expert_share
from ..ops import fixed, is_leaving
from . import expert_choice, soft, token_choice
from .balance import ExpertBias
from .dispatcher import TokenDispatcher
from .experts import Experts, SharedExpert
from .plan import KERNELS, DispatchPlan, RouteContext, Routing, RoutingPlan, RoutingStats
from .router import build_router
from .schedule import Schedules

ROUTINGS = {
    "token_choice": token_choice.route,
    "expert_choice": expert_choice.route,
    "soft": soft.route,
}


class MoEResult(NamedTuple):
    """The result of a layer.

    Attributes:
        output: like the input.
        aux_loss: scalar, the weighted balance losses.
        stats: see :class:`RoutingStats`.
        scale: [..., 1], factor of the output after its norm, see ``moe.gate_after_norm``, or None.
    """

    output: Tensor
    aux_loss: Tensor
    stats: RoutingStats
    scale: Tensor | None = None


class MoELayer(nn.Module):
    """Feed-forward experts, to which tokens are routed by ``moe.routing``.

    Args:
        dim: width D of the tokens.
        hidden_dim: width H inside an expert.
        group: expert-parallel group. Each of its ranks holds E / size experts. If there are more
            ranks than experts, size / E ranks hold equal parts of one expert's hidden width.
        initialise: draw the experts' weights; otherwise the caller sets them.

    Attributes:
        overlap_degree: chunks per exchange, see :mod:`swin_moe.moe.dispatcher`.
        schedules: those of its exchanges. Set ``schedules.equal_tokens`` if in each pass all ranks
            of the group have equally many tokens: padded plans then need no exchange of lengths.
        padded: whether every queue is sent at its full capacity, so that the host need not read
            its length; None = on CUDA only.

    Raises:
        ValueError: the experts cannot be spread evenly over the group.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        moe: MoEConfig,
        group: Group | None = None,
        *,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.group = group or Group()
        share = expert_share(moe.num_experts, self.group.rank, self.group.size)
        if hidden_dim % share.shards or dim % share.shards:
            raise ValueError(
                f"parallel.expert_parallel_size={self.group.size} cuts each of "
                f"moe.num_experts={moe.num_experts} in {share.shards}, which does not divide the "
                f"layer's width {dim} and its hidden width {hidden_dim}"
            )
        self.dim, self.hidden_dim = dim, hidden_dim
        self.moe = moe
        self.overlap_degree = 1 if moe.overlap_degree == "auto" else moe.overlap_degree
        self.padded: bool | None = None
        self.schedules = Schedules(self.group)
        self.kernels = KERNELS
        self.router = build_router(dim, moe)
        self.experts = Experts(
            share, dim, hidden_dim, self.kernels, fc2_bias=moe.fc2_bias, drop=moe.drop_rate
        )
        if initialise:
            with torch.random.fork_rng(devices=[]):  # later draws do not depend on these
                self.experts.reset_parameters(moe.init_std)
        self.choice_bias: ExpertBias | None = None  # its name in checkpoints
        if moe.expert_bias_update_rate:
            self.choice_bias = ExpertBias(moe.num_experts, moe.expert_bias_update_rate)
        self.shared: SharedExpert | None = None
        if moe.num_shared_experts:
            self.shared = SharedExpert(dim, moe.num_shared_experts * hidden_dim, moe.drop_rate)

    def forward(self, x: Tensor) -> MoEResult:
        """Apply the layer to x [..., D], or [B, H, W, D] if each image is routed on its own."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"tokens have width {x.shape[-1]}, the layer has {self.dim}")
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise ValueError(
                "a mixture of experts is exported to ONNX by torch.onnx.export(dynamo=True) only"
            )
        tokens = x.reshape(-1, self.dim)
        routing = self.route(tokens, self._groups(x))  # 1 gate, 2 balance
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        rows = routing.plan.dispatch(tokens, self.kernels)  # 3 dispatch
        rows, waited = self._apply_experts(rows, routing.plan)  # 4 experts
        plan, scale = self._split_scale(routing.plan)
        output = plan.combine(rows, self.kernels)  # 5 combine
        if self.shared is not None:
            output = output + self.shared(tokens)
        stats = routing.stats.with_waiting(waited) if waited else routing.stats
        scale = None if scale is None else scale.view(*x.shape[:-1], 1)
        return MoEResult(output.view_as(x).to(x.dtype), routing.aux_loss, stats, scale)

    def route(self, tokens: Tensor, groups: int = 1, noise: Tensor | None = None) -> Routing:
        """Run stages 1 and 2 for tokens [T, D].

        Args:
            groups: number of equal runs of tokens, each routed on its own.
            noise: see :class:`RouteContext`.
        """
        context = RouteContext(
            self.kernels,
            training=self.training,
            groups=groups,
            padded=self.group.size > 1 and (tokens.is_cuda if self.padded is None else self.padded),
            bias=None if self.choice_bias is None else self.choice_bias(),
            noise=noise,
        )
        return ROUTINGS[self.moe.routing](self.router(tokens), self.moe, context)

    def _groups(self, x: Tensor) -> int:
        if self.moe.routes_images_apart and x.dim() == 4 and fixed(x.shape[0]) > 0:
            return x.shape[0]
        return 1

    def _apply_experts(self, rows: Tensor, plan: DispatchPlan) -> tuple[Tensor, float]:
        """Apply the experts of all ranks to this rank's rows; return rows and seconds waited."""
        if self.group.size == 1:
            return self.experts(rows, plan.used, plan.stride), 0.0
        if is_leaving():
            raise ValueError(
                f"the experts are spread over {self.group.size} processes and cannot be exported: "
                "build the model in one process by swin_moe.build_model(NAME, pretrained=RUN)"
            )
        schedule, waited = self.schedules.find(plan, rows.shape[0], self.overlap_degree)
        dispatcher = TokenDispatcher(schedule, self.kernels)
        weights = self.experts.weights_as(rows.dtype)
        out = dispatcher.run(rows, partial(self.experts, weights=weights))
        return out, waited + dispatcher.waited

    def _split_scale(self, plan: DispatchPlan) -> tuple[DispatchPlan, Tensor | None]:
        """Split from the plan the factor of each token after the norm, [T] (``gate_after_norm``).

        The factor is relative to that of an undecided router, so that it is about 1 at the start.
        """
        if not (self.moe.gate_after_norm and isinstance(plan, RoutingPlan)):
            return plan, None
        even, total = plan.without_scale()
        return even, total / _undecided(self.moe)


def _undecided(moe: MoEConfig) -> float:
    """Return the sum of a token's gates if all logits are 0, as they nearly are at the start."""
    if moe.normalize_gate:
        return 1.0
    return moe.top_k * (0.5 if moe.score == "sigmoid" else 1.0 / moe.num_experts)
