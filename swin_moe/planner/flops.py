"""Counts the FLOPs of a model's matrix products by closed formulas, two per multiply-accumulate.

The counts equal those of :class:`torch.utils.flop_counter.FlopCounterMode` on the reference ops:
they include padding of windows and unused expert capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import ModelConfig, MoEConfig
from ..models.attention import CPB_HIDDEN
from ..models.swin import FAMILIES, effective_window
from ..moe.plan import expert_capacity
from ..ops import RouteOptions


@dataclass(frozen=True)
class Flops:
    """The FLOPs of a batch: forward pass, backward pass, and recomputed blocks on top."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


def _product(multiplications: int, input_has_gradient: bool = True) -> Flops:
    """Count a product, whose backward pass computes the gradients of weight and perhaps input."""
    forward = 2 * multiplications
    return Flops(forward, forward * (1 + input_has_gradient))


def flops(
    model: ModelConfig, moe: MoEConfig, images: int, rows: Sequence[int] | None = None
) -> Flops:
    """Count a training step on one rank with all experts.

    Args:
        model: sizes.
        moe: sizes.
        images: of the batch.
        rows: of all experts, for each MoE layer; default: the full capacity.
    """
    height, width = model.token_grid
    dim = model.embed_dim
    patch = model.in_chans * model.patch_size**2
    total = _product(images * height * width * dim * patch, input_has_gradient=False)
    computed = iter(rows) if rows is not None else None
    blocks, again = Flops(), 0
    for stage, depth in enumerate(model.depths):
        for block in range(depth):
            before = blocks.forward
            blocks += _attention(model, stage, block, images, height, width)
            if stage < len(moe.blocks) and block in moe.blocks[stage]:
                taken = None if computed is None else next(computed)
                blocks += _experts(model, moe, dim, images, height * width, taken)
            else:
                hidden = int(dim * model.mlp_ratio)
                blocks += _product(2 * images * height * width * dim * hidden)
            if block < model.recomputed_blocks(stage):
                again += blocks.forward - before
        if stage < len(model.depths) - 1:
            height, width = -(-height // 2), -(-width // 2)
            total += _product(images * height * width * 4 * dim * 2 * dim)
            dim *= 2
    total += _product(images * dim * model.num_classes)
    total += blocks
    return Flops(total.forward, total.backward, again)


def _attention(
    model: ModelConfig, stage: int, block: int, images: int, height: int, width: int
) -> Flops:
    family, dim = FAMILIES[model.family], model.embed_dim << stage
    window, shift = effective_window(height, width, model.window_size, block % 2 == 1)
    windows = images * -(-height // window) * -(-width // window)
    if family.cosine is None:
        padded = images * (-(-height // window) + (shift > 0)) * (-(-width // window) + (shift > 0))
        return _product(padded * window**4 * dim)
    total = _product(images * height * width * 4 * dim * dim)
    total += _product(2 * windows * window**4 * dim)  # q·k, and probabilities·v
    if family.position_bias != "table":
        offsets = (2 * window - 1) ** 2
        total += _product(offsets * 2 * CPB_HIDDEN, input_has_gradient=False)
        total += _product(offsets * CPB_HIDDEN * model.num_heads[stage])
    return total


def _experts(
    model: ModelConfig, moe: MoEConfig, dim: int, images: int, tokens: int, rows: int | None
) -> Flops:
    hidden, everything = int(dim * model.mlp_ratio), images * tokens
    total = Flops()
    if moe.routing == "soft":
        slots = moe.num_experts * moe.slots_per_expert
        total += _product(everything * dim * slots)
        total += _product(2 * everything * slots * dim)  # into the slots and out of them
    elif moe.router == "cosine":
        total += _product(everything * moe.cosine_router_dim * (dim + moe.num_experts))
    else:
        total += _product(everything * dim * moe.num_experts)
    if rows is None:
        rows = expert_rows(moe, images, tokens)
    total += _product(2 * rows * dim * hidden)
    shared = moe.num_shared_experts * hidden
    return total + _product(2 * everything * dim * shared)


def expert_rows(moe: MoEConfig, images: int, tokens: int, padded: bool = False) -> int:
    """Return the rows of all experts of a layer in training.

    Args:
        moe: routing and capacity.
        images: of the batch.
        tokens: of an image.
        padded: experts get their full capacity.
    """
    experts = moe.num_experts
    if moe.routing == "soft":
        return images * experts * moe.slots_per_expert
    groups = max(images, 1) if moe.routes_images_apart else 1
    own = images * tokens // groups
    capacity = expert_capacity(own, experts, moe.top_k, moe.capacity_factor)
    if moe.routing == "expert_choice":
        return groups * experts * min(own, capacity)
    options = RouteOptions(
        top_k=moe.top_k, groups=groups, capacity=capacity, padded=padded and capacity > 0
    )
    return options.rows(images * tokens, experts)
