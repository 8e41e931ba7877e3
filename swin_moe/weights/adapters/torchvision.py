"""torchvision's names: one list of modules, with stages at odd and patch merging at even places."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .base import Dialect, Kind
from .ours import ATTENTION, BLOCK, FIXED, MERGING, has, same
from .rules import Rule, renames
from .windows import never_shrinks_by_axis, position_buffers

THEIR_BLOCK = "features.{2s+1}.{b}."
STEM = {
    "patch_embed.proj.{p}": "features.0.0.{p}",
    "patch_embed.norm.{p}": "features.0.2.{p}",
    "norm.{p}": "norm.{p}",
    "head.{p}": "head.{p}",
}
PARTS = {"norm{n}.{p}": "norm{n}.{p}", "mlp.fc1.{p}": "mlp.0.{p}", "mlp.fc2.{p}": "mlp.3.{p}"}


def _read_bias(tensors: list[Tensor]) -> list[Tensor]:
    """Split V2's full bias; torchvision sets its k third to zero at each call."""
    q, _, v = tensors[0].chunk(3)
    return [q.clone(), v.clone()]


def _write_bias(tensors: list[Tensor]) -> list[Tensor]:
    q, v = tensors
    return [torch.cat((q, torch.zeros_like(q), v))]


def _rules(kind: Kind) -> list[Rule]:
    rules = [
        *renames(STEM),
        *renames(PARTS, BLOCK, THEIR_BLOCK),
        *renames(same(MERGING), "layers.{s}.downsample.", "features.{2s+2}."),
    ]
    ours, theirs = BLOCK + "attn.", THEIR_BLOCK + "attn."
    if kind.v2:
        biases = (ours + "q_bias", ours + "v_bias")
        rules.append(Rule(biases, (theirs + "qkv.bias",), read=_read_bias, write=_write_bias))
    return [*rules, *renames(same(ATTENTION), ours, theirs)]


ONLY = {"in_chans": 3, "ape": False, "qkv_bias": True, **FIXED}
TORCHVISION = Dialect(
    "torchvision",
    example="features.1.0.attn.qkv.weight",
    looks_like=partial(has, r"features\.\d+\.\d+\.attn\.qkv\."),
    rules=_rules,
    only={"swin": ONLY, "swinv2": ONLY},
    windows={"swin": never_shrinks_by_axis, "swinv2": never_shrinks_by_axis},
    extras=lambda model, _: position_buffers(model, THEIR_BLOCK + "attn", flat_index=True),
)
