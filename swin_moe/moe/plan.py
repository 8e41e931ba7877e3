"""The routing plan, which assigns tokens to experts by plain tensors, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops import Route, is_leaving, moe_combine, moe_dispatch, moe_experts, moe_route


class Kernels(NamedTuple):
    """The four ops of a layer, with the signatures of :mod:`swin_moe.ops`."""

    route: Callable[..., Route]
    dispatch: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    experts: Callable[..., Tensor]


# Each op runs its reference where it has no kernel.
KERNELS = Kernels(moe_route, moe_dispatch, moe_combine, moe_experts)


class RoutingStats(NamedTuple):
    """Statistics of one forward pass, on the device; they are read only when logged.

    Attributes:
        counts: [E] int64, assignments per expert on this rank, dropped ones included.
        sums: [6] float64, sums over tokens, which add up over steps and ranks: tokens, offered
            assignments, dropped assignments, tokens with non-finite logits, entropy of the routing
            probabilities (nats), seconds spent waiting for other ranks in the forward pass (see
            :class:`~swin_moe.moe.dispatcher.TokenDispatcher`).
        extremes: [2] float32: greatest router logit, and greatest negated one.
    """

    counts: Tensor
    sums: Tensor
    extremes: Tensor

    @property
    def dropped(self) -> Tensor:
        """Assignments beyond an expert's capacity: a scalar, or [layers] if layers are stacked."""
        return self.sums[..., 2]

    @property
    def nonfinite(self) -> Tensor:
        """Tokens with non-finite logits; they are dropped."""
        return self.sums[..., 3]

    def with_waiting(self, seconds: float) -> RoutingStats:
        """Return a copy with seconds spent waiting added; for one layer, not stacked ones."""
        waited = self.sums[5:] + seconds
        return self._replace(sums=torch.cat((self.sums[:5], waited)))


def make_stats(
    counts: Tensor,
    *,
    tokens: int,
    offered: int,
    dropped: Tensor,
    nonfinite: Tensor,
    entropy: Tensor,
    least: Tensor,
    greatest: Tensor,
) -> RoutingStats:
    wide = torch.float64
    # Filled on the device: a tensor made from a list is a copy that a GPU waits for.
    known = [counts.new_full((1,), n, dtype=wide) for n in (tokens, offered)]
    seen = [value.detach().to(wide).view(1) for value in (dropped, nonfinite, entropy)]
    sums = torch.cat((*known, *seen, counts.new_zeros(1, dtype=wide)))
    return RoutingStats(counts, sums, torch.stack((greatest.detach(), -least.detach())).float())


class DispatchPlan(Protocol):
    """A map from tokens to the experts' rows, and back.

    Attributes:
        used: [E] int64, rows of each expert.
        stride: distance between the first rows of two experts; 0 = the queues have no gaps.
    """

    @property
    def used(self) -> Tensor: ...

    @property
    def stride(self) -> int: ...

    def dispatch(self, tokens: Tensor, kernels: Kernels) -> Tensor: ...

    def combine(self, rows: Tensor, kernels: Kernels) -> Tensor: ...


@dataclass(frozen=True)
class RoutingPlan:
    """A plan that routes each of T tokens to k of E experts.

    Attributes:
        expert: [T, k] int64, chosen expert of each assignment.
        gate: [T, k] fp32, weight of each assignment; the only differentiable member.
        slot: [T, k] int32, place in the expert's queue, also of dropped assignments.
        source: [S] int32, the assignment t·k+j of each row, −1 for an empty one.
        destination: [T, k] int32, the row of each assignment, −1 for a dropped one.
        counts: [E] int64, assignments per expert, dropped ones included.
        used, stride: see :class:`DispatchPlan`.
        capacity: places per expert and group; 0 = dropless.
    """

    expert: Tensor
    gate: Tensor
    slot: Tensor
    source: Tensor
    destination: Tensor
    counts: Tensor
    used: Tensor
    stride: int
    capacity: int

    @property
    def kept(self) -> Tensor:
        """Whether each assignment has a row, [T, k] bool."""
        return self.destination >= 0

    def without_scale(self) -> tuple[RoutingPlan, Tensor]:
        """Return a plan whose kept gates sum to one for each token, and their sums before, [T]."""
        gate = self.gate * self.kept
        total = gate.sum(1)
        floor = torch.finfo(gate.dtype).eps
        return replace(self, gate=gate / total.clamp(min=floor)[:, None]), total

    def dispatch(self, tokens: Tensor, kernels: Kernels) -> Tensor:
        """Return the rows [S, D] of tokens [T, D]."""
        return kernels.dispatch(tokens, self.source, self.destination)

    def combine(self, rows: Tensor, kernels: Kernels) -> Tensor:
        """Return tokens [T, D]: rows [S, D], weighted and summed over the choices."""
        return kernels.combine(rows, self.gate, self.source, self.destination)


class Routing(NamedTuple):
    """A routing decision: the plan, the weighted balance loss (a scalar), the statistics."""

    plan: DispatchPlan
    aux_loss: Tensor
    stats: RoutingStats


@dataclass(frozen=True)
class RouteContext:
    """The inputs of a routing mode in addition to the logits.

    Attributes:
        training: whether to add gate noise, and to use ``top_k`` and ``capacity_factor`` instead
            of those for evaluation.
        groups: number of equal runs of tokens (images), each routed on its own.
        padded: whether every expert gets a block of rows of equal size, for fixed-size exchanges.
        bias: [E] for the choice of experts, see ``moe.expert_bias_update_rate``.
        noise: [T, E] standard normal draws to use instead of fresh ones.
    """

    kernels: Kernels
    training: bool = True
    groups: int = 1
    padded: bool = False
    bias: Tensor | None = None
    noise: Tensor | None = None


def group_size(tokens: int, groups: int) -> int:
    """Return the number of tokens per group, from which the capacity follows.

    Raises:
        ValueError: it depends on the number of images, which an exported graph leaves open.
    """
    size = tokens // groups
    if not is_leaving():
        return size
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # imports sympy

    # In a trace no size is concrete: it holds for one size of map, and its groups are images.
    constant = type(groups) is not int if torch.jit.is_tracing() else is_concrete_int(size)
    if not constant:
        raise ValueError(
            "an expert's capacity depends on the number of images, which this graph leaves open: "
            "set moe.eval_capacity_factor=0 or moe.route_per_image=true, or export for a fixed "
            "number (torch.export without dynamic_shapes)"
        )
    return int(size)


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Return k·int(f·⌈T/E⌉) places per expert (Tutel's rule), at least 1; 0 if ``factor`` is 0."""
    if factor == 0:
        return 0
    return max(1, top_k * int(factor * -(-num_tokens // num_experts)))
