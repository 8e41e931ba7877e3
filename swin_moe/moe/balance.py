"""Losses that keep the load of the experts even. Each returns a scalar; nothing is stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gshard_loss(scores: Tensor, expert: Tensor) -> Tensor:
    """E·Σₑ mean(scoreₑ)·(share of first choices)ₑ (GShard, https://arxiv.org/abs/2006.16668).

    Args:
        scores: [T, E] probabilities, with the noise that routed. expert: [T, k].
    """
    T, E = scores.shape
    first = torch.zeros(E, dtype=scores.dtype, device=scores.device)
    first.scatter_add_(0, expert[:, 0], torch.ones_like(expert[:, 0], dtype=scores.dtype))
    return E * (scores.mean(0) * (first / T)).sum()


def importance_load_loss(clean_scores: Tensor, top_logits: Tensor, gate_noise: float) -> Tensor:
    """½[CV²(importance) + CV²(load)] (https://arxiv.org/abs/1701.06538, as Tutel computes it).

    The load is the chance that an expert's noise-free *score* beats the k-th noisy *logit* under
    the gate noise. Comparing a score with a logit is odd, but is what the published models used.

    Args:
        clean_scores: [T, E] probabilities without noise.
        top_logits: [T, k] noisy logits of the chosen experts, best first.
        gate_noise: > 0; the noise has standard deviation gate_noise / E.
    """
    if gate_noise <= 0:
        raise ValueError("moe.balance=importance_load needs moe.gate_noise > 0")
    sigma = gate_noise / clean_scores.shape[1]
    z = (clean_scores - top_logits[:, -1:]) / (sigma * math.sqrt(2.0))
    load = 0.5 * (1.0 + torch.erf(z))
    return 0.5 * (_cv_squared(clean_scores.sum(0)) + _cv_squared(load.sum(0)))


def _cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation; from the variance, as std has no gradient at zero."""
    if x.numel() < 2:
        return x.sum() * 0.0
    return x.var() / (x.mean().square() + 1e-10)
