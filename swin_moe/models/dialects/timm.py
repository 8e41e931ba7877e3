"""timm's names since 0.9 (older ones are official): patch merging starts a stage there."""

from __future__ import annotations

from collections.abc import Collection

from .base import Dialect, Kind
from .ours import BODY, HEAD, MERGING, has_layers, same
from .rules import Rule, renames
from .windows import shrinks_by_axis


def _rules(kind: Kind) -> list[Rule]:
    return [
        *BODY,
        *renames(same(MERGING), "layers.{s}.downsample.", "layers.{s+1}.downsample."),
        *renames({HEAD: "head.fc.{p}"}),
    ]


def _looks_like(names: Collection[str]) -> bool:
    return has_layers(names, merging_first=True)


ONLY = {
    "ape": False,
    "patch_norm": True,
    "qk_scale": None,
    "mlp_fc2_bias": True,
    "extra_norm_every_n_blocks": 0,
}
TIMM = Dialect(
    "timm",
    example="layers.1.downsample.norm.weight with head.fc.weight",
    looks_like=_looks_like,
    rules=_rules,
    only={"swin": ONLY, "swinv2": ONLY},
    windows={"swin": shrinks_by_axis, "swinv2": shrinks_by_axis},
)
