"""Parameters and multiply-accumulates of a model, counted as the published tables count them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import ModelConfig, MoEConfig
from .swin import SwinTransformer, effective_window


@dataclass(frozen=True)
class Cost:
    """Counts of one model.

    Attributes:
        parameters: all, of all experts.
        activated: those that one token meets: k of E experts in each MoE layer.
        macs: multiply-accumulates of one image's forward pass.
    """

    parameters: int
    activated: int
    macs: int


def count(model: ModelConfig, moe: MoEConfig) -> Cost:
    """Count from the config alone: the model is built on the meta device and needs no memory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        built = SwinTransformer(model, moe.model_copy(update={"backend": "reference"}))
    total = sum(p.numel() for p in built.parameters())
    experts = sum(p.numel() for name, p in built.named_parameters() if ".experts." in name)
    idle = experts * (moe.num_experts - moe.top_k) // moe.num_experts
    return Cost(total, total - idle, multiply_accumulates(model, moe))


def multiply_accumulates(model: ModelConfig, moe: MoEConfig) -> int:
    """Forward MACs of one image by the official ``flops()`` rules (norms count C per token)."""
    grid = -(-model.img_size // model.patch_size)
    dim = model.embed_dim
    patch_area = model.patch_size**2
    total = grid * grid * dim * (model.in_chans * patch_area + int(model.patch_norm))
    for stage, depth in enumerate(model.depths):
        moe_blocks = moe.blocks[stage] if stage < len(moe.blocks) else []
        tokens = grid * grid
        window, _ = effective_window(grid, grid, model.window_size, False)
        windows = (-(-grid // window)) ** 2
        n = window * window
        attention = windows * (4 * n * dim * dim + 2 * n * n * dim)
        feed_forward = int(2 * tokens * dim * dim * model.mlp_ratio)
        for block in range(depth):
            is_moe = block in moe_blocks
            total += attention + 2 * tokens * dim
            total += feed_forward * (moe.top_k if is_moe else 1)
            total += tokens * dim * moe.num_experts if is_moe else 0
        if stage < len(model.depths) - 1:
            total += tokens * dim // 2 + (-(-grid // 2)) ** 2 * 4 * dim * 2 * dim
            grid, dim = -(-grid // 2), 2 * dim
    return total + dim * grid * grid + dim * model.num_classes
