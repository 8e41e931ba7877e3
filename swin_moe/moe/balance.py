"""Balance of the experts' loads: by losses, or by a bias without a loss.

Each loss is a scalar, computed from a route's sums over tokens; nothing is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..ops import Route


def balance_loss(moe: MoEConfig, route: Route) -> Tensor:
    """Return the weighted sum of the losses of ``moe.balance`` and ``moe.z_loss_weight``."""
    tokens = route.expert.shape[0]
    loss = route.scalars.new_zeros(())
    if tokens == 0:
        return loss
    scores, importance, load = route.sums
    weight = moe.layer_aux_loss_weight
    if weight and moe.balance == "gshard":
        loss = loss + weight * gshard_loss(scores, route.first, tokens)
    elif weight and moe.balance == "importance_load":
        loss = loss + weight * importance_load_loss(importance, load)
    if moe.z_loss_weight:
        loss = loss + moe.z_loss_weight * route.scalars[0] / tokens
    return loss


def gshard_loss(scores: Tensor, first: Tensor, tokens: int) -> Tensor:
    """Return E·Σₑ mean(scoreₑ)·(share of first choices)ₑ (GShard, https://arxiv.org/abs/2006.16668).

    Args:
        scores: [E], routing probabilities, summed over tokens.
        first: [E], first choices per expert.
    """
    return scores.numel() * (scores * first.to(scores.dtype)).sum() / tokens**2


def importance_load_loss(importance: Tensor, load: Tensor) -> Tensor:
    """Return ½[CV²(importance) + CV²(load)] (https://arxiv.org/abs/1701.06538, as in Tutel).

    Args:
        importance: [E], probabilities without noise, summed over tokens.
        load: [E], probability of being chosen under the gate noise, summed over tokens, see
            :func:`swin_moe.ops.moe_route`.
    """
    return 0.5 * (_cv_squared(importance) + _cv_squared(load))


def _cv_squared(x: Tensor) -> Tensor:
    """Return the squared coefficient of variation, from the variance: std has no gradient at 0."""
    if x.numel() < 2:
        return x.sum() * 0.0
    return x.var() / (x.mean().square() + 1e-10)


class ExpertBias(nn.Module):
    """A bias per expert on the choice, never on the gate: balance without a loss.

    After each optimizer step the bias of an overloaded expert falls by ``rate``, and that of an
    underloaded one rises by it (https://arxiv.org/abs/2408.15664). The net number of rises is an
    integer, so that a cast of the model does not round it.
    """

    rises: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("rises", torch.zeros(num_experts, dtype=torch.int64))

    def forward(self) -> Tensor:
        """Return the biases, [E] fp32."""
        return self.rises.to(torch.float32) * self.rate

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Move the biases; called once per optimizer step.

        Args:
            counts: [E], assignments of all ranks in that step.
        """
        counts = counts.to(torch.float64)
        self.rises += (counts.mean() - counts).sign().to(torch.int64)
