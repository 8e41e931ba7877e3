"""Our names: the official ones without their buffers, and experts of our own."""

from __future__ import annotations

import re
from collections.abc import Collection

from .base import BUFFERS, Dialect
from .rules import Rule, renames

BLOCK = "layers.{s}.blocks.{b}."
STEM = ("patch_embed.proj.{p}", "patch_embed.norm.{p}", "absolute_pos_embed", "norm.{p}")
HEAD = "head.{p}"
# Options that have only one value in transformers, timm and torchvision.
FIXED: dict[str, object] = {
    "patch_norm": True, "qk_scale": None, "mlp_fc2_bias": True, "extra_norm_every_n_blocks": 0,
}  # fmt: skip
SAME_KEYS = {  # of our config, transformers' and timm's
    "patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias",
}  # fmt: skip
MERGING = ("reduction.weight", "norm.{p}")
ATTENTION = (
    "qkv.{p}", "proj.{p}", "q_bias", "v_bias", "logit_scale", "cpb_mlp.0.{p}", "cpb_mlp.2.weight",
    "relative_position_bias_table",
)  # fmt: skip
EXPERTS = (
    "router.weight", "router.temperature", "router.cosine_projector.{p}", "router.sim_matrix",
    "router.scale", "experts.fc1.{p}", "experts.fc2.{p}", "shared.fc1.{p}", "shared.fc2.{p}",
    "choice_bias.rises",
)  # fmt: skip


def same(names: Collection[str]) -> dict[str, str]:
    """Map each name to itself."""
    return {name: name for name in names}


def _kept(names: Collection[str], prefix: str = "") -> list[Rule]:
    return renames(same(names), prefix, prefix)


BODY = [
    *_kept(STEM),
    *_kept(("norm{n}.{p}", "spatial_mlp.{p}", "mlp.fc1.{p}", "mlp.fc2.{p}"), BLOCK),
    *_kept(ATTENTION, BLOCK + "attn."),
]
DENSE = [*BODY, *_kept(MERGING, "layers.{s}.downsample."), *_kept([HEAD])]


def has(pattern: str, names: Collection[str]) -> bool:
    return any(re.match(pattern, name) for name in names)


def has_layers(names: Collection[str], *, merging_first: bool) -> bool:
    """Return whether blocks have official names, with patch merging at the given place.

    Args:
        merging_first: at the start of the next stage (timm, which also has ``head.fc``), not at the
            end of a stage (ours, official).
    """
    if has(r"layers\.\d+\.downsample\.", names):
        first = not has(r"layers\.0\.downsample\.", names)
    else:
        first = has(r"head\.fc\.", names)
    return has(r"layers\.\d+\.blocks\.\d+\.norm1\.", names) and first == merging_first


def _looks_like(names: Collection[str]) -> bool:
    tutel = any("._moe_layer." in name for name in names)
    return has_layers(names, merging_first=False) and not tutel


OURS = Dialect(
    "swin_moe",
    example="layers.0.blocks.0.norm1.weight",
    looks_like=_looks_like,
    rules=lambda _: [*DENSE, *_kept(EXPERTS, BLOCK + "mlp.")],
    dropped=rf"{BUFFERS}|mask_token",  # SimMIM adds that to the backbone
)
