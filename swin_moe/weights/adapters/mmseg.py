"""OpenMMLab's names: Swin in mmseg, mmdet and mmpretrain, and mmpretrain's SwinV2.

Their patch merging uses ``nn.Unfold``, whose channels have another order. V1 merges at the end of a
stage, V2 at the start of the next one.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .base import BUFFERS, Dialect, Kind
from .ours import ATTENTION, BLOCK, has, same
from .rules import Rule, renames
from .windows import never_shrinks, position_buffers, shrinks

THEIR_BLOCK = "stages.{s}.blocks.{b}."
STEM = {
    "patch_embed.proj.{p}": "patch_embed.projection.{p}",
    "patch_embed.norm.{p}": "patch_embed.norm.{p}",
    "absolute_pos_embed": "absolute_pos_embed",
    "head.{p}": "head.fc.{p}",
}
PARTS = {
    "norm{n}.{p}": "norm{n}.{p}",
    "mlp.fc1.{p}": "ffn.layers.0.0.{p}",
    "mlp.fc2.{p}": "ffn.layers.1.{p}",
}


def _from_unfold(tensors: list[Tensor]) -> list[Tensor]:
    """Reorder the last dimension 4C from (channel, row, column) to (column, row, channel)."""
    return [t.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3) for t in tensors]


def _to_unfold(tensors: list[Tensor]) -> list[Tensor]:
    return [t.unflatten(-1, (2, 2, -1)).transpose(-3, -1).flatten(-3) for t in tensors]


def _rules(kind: Kind) -> list[Rule]:
    ours = "layers.{s}.downsample."
    theirs = "stages.{s+1}.downsample." if kind.v2 else "stages.{s}.downsample."
    unfolded = ["reduction.weight"] if kind.v2 else ["reduction.weight", "norm.{p}"]
    merging = [Rule((ours + n,), (theirs + n,), _from_unfold, _to_unfold) for n in unfolded]
    return [
        *renames(STEM),
        # The output norm of the last stage; converted official files keep the name norm.
        *renames({"norm.{p}": f"norm{kind.stages - 1}.{{p}}"}),
        *renames({"norm.{p}": "norm.{p}"}),
        *merging,
        *renames({"norm.{p}": "norm.{p}"} if kind.v2 else {}, ours, theirs),
        *renames(PARTS, BLOCK, THEIR_BLOCK),
        *renames(same(ATTENTION), BLOCK + "attn.", THEIR_BLOCK + "attn.w_msa."),
    ]


MMSEG = Dialect(
    "mmseg",
    example="backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
    looks_like=partial(has, r"stages\.\d+\.blocks\.\d+\.attn\.w_msa\."),
    rules=_rules,
    only={
        "swin": {"mlp_fc2_bias": True, "extra_norm_every_n_blocks": 0},
        "swinv2": {"mlp_fc2_bias": True},
    },
    # V2's config sets the window of each stage.
    windows={"swin": never_shrinks, "swinv2": shrinks},
    prefix=r"(module\.)?(backbone\.)?",
    body={"swin": "backbone.", "swinv2": "backbone."},
    dropped=rf"{BUFFERS}|norm\d+\..*|mask_token|(neck|\w+_head)\..*",
    extras=lambda model, _: position_buffers(model, THEIR_BLOCK + "attn.w_msa"),
)
