"""What keeps the load of the experts even: losses, and a bias without a loss.

Each loss is a scalar made of a route's sums over tokens; nothing is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..ops import Route


def balance_loss(moe: MoEConfig, route: Route) -> Tensor:
    """The losses that ``moe.balance`` and ``moe.z_loss_weight`` ask for, weighted and added."""
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
    """E·Σₑ mean(scoreₑ)·(share of first choices)ₑ (GShard, https://arxiv.org/abs/2006.16668).

    Args:
        scores: [E], the probabilities that routed, summed over tokens. first: [E] first choices.
    """
    return scores.numel() * (scores * first.to(scores.dtype)).sum() / tokens**2


def importance_load_loss(importance: Tensor, load: Tensor) -> Tensor:
    """½[CV²(importance) + CV²(load)] (https://arxiv.org/abs/1701.06538, as Tutel computes it).

    Args:
        importance: [E], probabilities without noise, summed over tokens.
        load: [E], chance to be chosen under the gate noise, summed over tokens, see
            :func:`swin_moe.ops.moe_route`.
    """
    return 0.5 * (_cv_squared(importance) + _cv_squared(load))


def _cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation; from the variance, as std has no gradient at zero."""
    if x.numel() < 2:
        return x.sum() * 0.0
    return x.var() / (x.mean().square() + 1e-10)


class ExpertBias(nn.Module):
    """A bias per expert on the choice, never on the gate: balance without a loss.

    After each optimizer step the bias of an overloaded expert falls by the rate, that of an
    underloaded one rises by it (https://arxiv.org/abs/2408.15664). The net number of rises is
    kept as whole numbers, so that no precision of the model's rounds it.
    """

    rises: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("rises", torch.zeros(num_experts, dtype=torch.int64))

    def forward(self) -> Tensor:
        """[E] fp32."""
        return self.rises.to(torch.float32) * self.rate

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """To be called once per optimizer step with the assignments [E] of all ranks in it."""
        counts = counts.to(torch.float64)
        self.rises += (counts.mean() - counts).sign().to(torch.int64)
