"""timm's names since 0.9 (older ones are official): patch merging starts a stage."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...config import ModelConfig
from .base import Dialect, Images, Kind, check
from .ours import BODY, FIXED, HEAD, MERGING, SAME_KEYS, has_layers, same
from .rules import Rule, renames
from .windows import shrinks_by_axis


def _rules(kind: Kind) -> list[Rule]:
    return [
        *BODY,
        *renames(same(MERGING), "layers.{s}.downsample.", "layers.{s+1}.downsample."),
        *renames({HEAD: "head.fc.{p}"}),
        *renames({HEAD: HEAD}),  # of a module that holds timm's as its backbone
    ]


ONLY = {"ape": False, **FIXED}
TIMM = Dialect(
    "timm",
    example="layers.1.downsample.norm.weight with head.fc.weight",
    looks_like=partial(has_layers, merging_first=True),
    rules=_rules,
    only={"swin": ONLY, "swinv2": ONLY},
    windows={"swin": shrinks_by_axis, "swinv2": shrinks_by_axis},
)


def timm_config(
    model: ModelConfig, images: Images | None, classes: list[str] | None = None
) -> dict[str, Any]:
    """Return the ``config.json`` with which ``timm.create_model`` opens ``local-dir:FOLDER``.

    Raises:
        DialectError: timm cannot compute the same function.
    """
    check(TIMM, model)
    arguments: dict[str, Any] = {
        "img_size": list(model.image_sides),
        **model.model_dump(include=SAME_KEYS | {"in_chans"}),
    }
    if model.family == "swinv2":
        pretrained = model.pretrained_window_sizes or [0] * len(model.depths)
        arguments["pretrained_window_sizes"] = pretrained
    pretrained_cfg: dict[str, Any] = {
        "input_size": [model.in_chans, *model.image_sides],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_mode": "center",
        "num_classes": model.num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
    }
    if images is not None:
        pretrained_cfg |= {"crop_pct": images.crop, "mean": images.mean, "std": images.std}
    return {
        "architecture": _architecture(model),
        "num_classes": model.num_classes,
        "num_features": model.embed_dim << (len(model.depths) - 1),
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": pretrained_cfg,
        **({"label_names": classes} if classes is not None else {}),
    }


def _architecture(model: ModelConfig) -> str:
    """Return timm's name of the model, or a name whose every size ``model_args`` replaces."""
    import timm  # imports all its models

    known = model.name.removesuffix("_22kto1k").removesuffix("_22k")
    if timm.is_model(known):
        return known
    any_size = {"swin": "swin_tiny_patch4_window7_224", "swinv2": "swinv2_tiny_window8_256"}
    return any_size[model.family]
