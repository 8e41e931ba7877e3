"""Parameters and multiply-accumulates of a model, counted as the published tables count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..config import ModelConfig, MoEConfig
from .swin import FAMILIES, SwinTransformer, effective_window


@dataclass(frozen=True)
class Cost:
    """Counts of one model.

    Attributes:
        parameters: all, of all experts.
        activated: those that one token meets: k of E experts in each MoE layer.
        macs: multiply-accumulates of one image's forward pass.
        experts: of the parameters, those of experts.
    """

    parameters: int
    activated: int
    macs: int
    experts: int = 0


def count(model: ModelConfig, moe: MoEConfig, build: Callable[[], nn.Module] | None = None) -> Cost:
    """Count from the config alone: the model is built on the meta device and needs no memory.

    Args:
        build: makes the model of a task around the backbone; multiply-accumulates are the
            backbone's.
    """
    moe = moe.model_copy(update={"backend": "fused"})
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        built = build() if build else SwinTransformer(model, moe)
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts - experts * moe.top_k // moe.num_experts
    total = sum(sizes.values())
    return Cost(total, total - idle, _macs(model, moe), experts)


def _macs(model: ModelConfig, moe: MoEConfig) -> int:
    """The official repository's rules, norms included (norms count C per token)."""
    family = FAMILIES[model.family]
    height, width = model.token_grid
    dim = model.embed_dim
    patch_area = model.patch_size**2
    total = height * width * dim * (model.in_chans * patch_area + int(model.patch_norm))
    for stage, depth in enumerate(model.depths):
        moe_blocks = moe.blocks[stage] if stage < len(moe.blocks) else []
        tokens = height * width
        for block in range(depth):
            is_moe = block in moe_blocks
            window, shift = effective_window(height, width, model.window_size, block % 2 == 1)
            if family.cosine is None:
                total += _windows(height, width, window, shift > 0) * dim * window**4
            else:
                per_window = 4 * window**2 * dim * dim + 2 * window**4 * dim
                total += _windows(height, width, window, False) * per_window
            total += 2 * tokens * dim  # norms
            total += int(2 * tokens * dim * dim * model.mlp_ratio) * (moe.top_k if is_moe else 1)
            total += tokens * dim * moe.num_experts if is_moe else 0
        if stage < len(model.depths) - 1:
            total += tokens * dim // 2 if family.post_norm else tokens * dim  # norm
            height, width = -(-height // 2), -(-width // 2)
            total += height * width * 4 * dim * 2 * dim
            dim *= 2
    # The official count of the last norm: the first stage's tokens over 2^stages, not 4^(stages−1).
    last_norm = dim * model.token_grid[0] * model.token_grid[1] // 2 ** len(model.depths)
    return total + last_norm + dim * model.num_classes


def _windows(height: int, width: int, window: int, padded: bool) -> int:
    """Windows of a block; SwinMLP shifts by padding, which adds one in each direction."""
    return (-(-height // window) + padded) * (-(-width // window) + padded)
