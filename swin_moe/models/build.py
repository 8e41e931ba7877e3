"""Build a model from its config sections, and parse the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..config import ModelConfig, MoEConfig
from ..distributed import Group
from .swin import SwinTransformer


def build(model: ModelConfig, moe: MoEConfig, expert_group: Group | None = None) -> SwinTransformer:
    """Build the model of two config sections; weights are drawn from torch's global generator."""
    return SwinTransformer(model, moe, expert_group)


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that hold this rank's experts only ([E_local, ...])."""
    return {name for name, _ in model.named_parameters() if ".experts." in name}


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Return the layer of a parameter for layer decay, 0 to Σdepths + 1, also under ``encoder.``.

    These are the ids of the official fine-tuning of SimMIM: patch embedding and mask token are 0,
    block i of the whole model is i + 1, a stage's patch merging belongs to its last block, and all
    others are last, also an absolute position embedding.
    """
    name = name.removeprefix("encoder.")
    if name.startswith(("patch_embed.", "mask_token")):
        return 0
    place = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if place is None:
        return sum(depths) + 1
    stage, block = int(place[1]), place[2]
    return sum(depths[: stage + 1]) if block is None else sum(depths[:stage]) + int(block) + 1


def stage_of(name: str) -> int:
    """Return the stage of a block or parameter named such as ``encoder.layers.2.blocks.1``."""
    place = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    assert place is not None, name
    return int(place[1])
