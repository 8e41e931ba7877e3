"""From the config sections of a model to the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..config import ModelConfig, MoEConfig
from ..distributed import Group
from .swin import SwinTransformer


def build(model: ModelConfig, moe: MoEConfig, expert_group: Group | None = None) -> SwinTransformer:
    """The model of two config sections; weights are drawn from torch's global generator."""
    return SwinTransformer(model, moe, expert_group)


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that hold this rank's experts only ([E_local, ...])."""
    return {name for name, _ in model.named_parameters() if ".experts." in name}


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Layer of a parameter for layer decay, 0 to Σdepths + 1, also under ``encoder.``.

    Patch embedding and mask token are 0, block i of the whole model is i + 1, a stage's patch
    merging belongs to its last block, and the rest comes last, an absolute position embedding
    included: the ids of the official fine-tuning of SimMIM.
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
    """The stage of a block or parameter, from a name such as ``encoder.layers.2.blocks.1``."""
    place = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    assert place is not None, name
    return int(place[1])
