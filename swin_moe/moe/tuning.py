"""``moe.overlap_degree=auto``: measure the fastest number of chunks per exchange."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from ..distributed import all_reduce_
from .build import build_moe
from .layer import MoELayer

DEGREES = (1, 2, 4)
_ROUNDS = 5
_GAIN = 0.02  # part of the time that a higher degree must save; less is noise


def choose_overlap(
    layers: Sequence[MoELayer],
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Set ``overlap_degree`` of layers of one shape to the fastest; every rank must call it.

    A copy of the first layer runs forward and backward on random tokens; the layers and torch's
    generators do not change. All ranks choose the degree by the median of the slowest rank.

    Args:
        shape: [B, H, W] of the tokens.

    Returns:
        the measurements and the choice, in one line.
    """
    model = layers[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(model.group.rank)
        trial = build_moe(model.dim, model.hidden_dim, model.moe, model.group)
        trial.experts.reset_parameters(model.moe.init_std)
        trial.to(device, dtype)
        trial.schedules.equal_tokens = True  # as in training
        tokens = torch.randn(*shape, model.dim, device=device, dtype=dtype).requires_grad_()
        seconds: dict[int, list[float]] = {degree: [] for degree in DEGREES}
        for _ in range(_ROUNDS + 1):
            for degree in DEGREES:
                trial.overlap_degree = degree
                seconds[degree].append(_time(trial, tokens))
    medians = torch.tensor([median(s[1:]) for s in seconds.values()], device=device)
    slowest = dict(zip(DEGREES, all_reduce_(medians, "max").tolist(), strict=True))
    enough = min(slowest.values()) * (1 + _GAIN)
    chosen = next(degree for degree in DEGREES if slowest[degree] <= enough)
    for layer in layers:
        layer.overlap_degree = chosen
    times = ", ".join(f"{degree}: {1e3 * s:.2f} ms" for degree, s in slowest.items())
    return f"moe.overlap_degree=auto measured {times} and takes {chosen}"


def _time(layer: MoELayer, tokens: Tensor) -> float:
    """Return the seconds of one forward and backward pass; its exchanges synchronise the ranks."""
    began = time.perf_counter()
    with torch.enable_grad():
        layer(tokens).output.sum().backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
