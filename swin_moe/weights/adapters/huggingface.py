"""The names in transformers' files: SwinForImageClassification and Swinv2ForImageClassification.

transformers 5 renames V1's modules on loading and reverses that on saving; state dicts of its
modules are read too.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from .base import BUFFERS, Dialect, Images, Kind, check
from .ours import BLOCK, FIXED, MERGING, SAME_KEYS, has, same
from .rules import Rule, renames
from .windows import never_shrinks, shrinks_by_height

THEIR_BLOCK = "encoder.layers.{s}.blocks.{b}."
STEM = {
    "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
    "patch_embed.norm.{p}": "embeddings.norm.{p}",
    "absolute_pos_embed": "embeddings.position_embeddings",
    "norm.{p}": "layernorm.{p}",
    "head.{p}": "classifier.{p}",
}
PARTS = {
    "norm1.{p}": "layernorm_before.{p}",
    "norm2.{p}": "layernorm_after.{p}",
    "attn.proj.{p}": "attention.output.dense.{p}",
    "attn.relative_position_bias_table": "attention.self.relative_position_bias_table",
    "attn.logit_scale": "attention.self.logit_scale",
    "attn.cpb_mlp.0.{p}": "attention.self.continuous_position_bias_mlp.0.{p}",
    "attn.cpb_mlp.2.weight": "attention.self.continuous_position_bias_mlp.2.weight",
    "mlp.fc1.{p}": "intermediate.dense.{p}",
    "mlp.fc2.{p}": "output.dense.{p}",
}
TABLE = "relative_position_bias_table"
MODULE_PARTS = {
    "attn.proj.{p}": "attention.o_proj.{p}",
    f"attn.{TABLE}": f"attention.relative_position_bias.{TABLE}",
    "mlp.fc1.{p}": "mlp.fc1.{p}",
    "mlp.fc2.{p}": "mlp.fc2.{p}",
}


def _split(tensors: list[Tensor]) -> list[Tensor]:
    return [part.clone() for part in tensors[0].chunk(3)]  # files cannot hold views


def _qkv(kind: str, *theirs: str) -> Rule:
    their_names = tuple(f"{THEIR_BLOCK}attention.{name}.{kind}" for name in theirs)
    ours = (f"{BLOCK}attn.qkv.{kind}",)
    return Rule(ours, their_names, read=lambda parts: [torch.cat(parts)], write=_split)


def _rules(kind: Kind) -> list[Rule]:
    file, module = ("self.query", "self.key", "self.value"), ("q_proj", "k_proj", "v_proj")
    if kind.v2:  # k has no bias
        biases = {"attn.q_bias": "attention.self.query.bias",
                  "attn.v_bias": "attention.self.value.bias"}  # fmt: skip
        attention = [_qkv("weight", *file), *renames(biases, BLOCK, THEIR_BLOCK)]
    else:
        attention = [_qkv(kind, *names) for names in (file, module) for kind in ("weight", "bias")]
    return [
        *renames(STEM),
        *attention,
        *renames(PARTS, BLOCK, THEIR_BLOCK),
        *renames(MODULE_PARTS, BLOCK, THEIR_BLOCK),
        *renames(same(MERGING), "layers.{s}.downsample.", "encoder.layers.{s}.downsample."),
    ]


HUGGINGFACE = Dialect(
    "huggingface",
    example="swin.encoder.layers.0.blocks.0.layernorm_before.weight",
    looks_like=partial(has, r"encoder\.layers\.\d+\.blocks\.\d+\.layernorm_before\."),
    rules=_rules,
    # V2's position embedding has room for a class token, and can then not be added.
    only={"swin": FIXED, "swinv2": {**FIXED, "ape": False}},
    windows={"swin": never_shrinks, "swinv2": shrinks_by_height},
    prefix=r"(module\.)?(swin\.|swinv2\.)?",
    body={"swin": "swin.", "swinv2": "swinv2."},
    outside="classifier.",
    dropped=rf"{BUFFERS}|decoder\..*|embeddings\.mask_token|hidden_states_norms\..*",
)


def huggingface_config(model: ModelConfig, classes: list[str] | None = None) -> dict[str, Any]:
    """Return the ``config.json`` for a state dict written for ``huggingface``.

    Raises:
        DialectError: transformers cannot compute the same function.
    """
    check(HUGGINGFACE, model)
    config: dict[str, Any] = {
        "architectures": [f"{model.family.capitalize()}ForImageClassification"],
        "model_type": model.family,
        "image_size": model.img_size,
        "num_channels": model.in_chans,
        **_labels(model, classes),
        **model.model_dump(include=SAME_KEYS),
        "hidden_dropout_prob": model.drop_rate,
        "attention_probs_dropout_prob": model.attn_drop_rate,
        "drop_path_rate": model.drop_path_rate,
        "use_absolute_embeddings": model.ape,
        "initializer_range": model.init_std,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "encoder_stride": model.patch_size << (len(model.depths) - 1),
    }
    if model.family == "swinv2":
        config["pretrained_window_sizes"] = model.pretrained_window_sizes or [0] * len(model.depths)
    return config


def _labels(model: ModelConfig, classes: list[str] | None) -> dict[str, Any]:
    if classes is None:
        return {"num_labels": model.num_classes}
    return {
        "id2label": {str(label): name for label, name in enumerate(classes)},
        "label2id": {name: label for label, name in enumerate(classes)},
    }


def huggingface_processor(model: ModelConfig, images: Images) -> dict[str, Any] | None:
    """Return a ``preprocessor_config.json`` that prepares images as our evaluation does.

    In all versions, CLIP's processor resizes the shorter side and crops the centre. Its crop may
    lie one pixel off ours: it rounds half an odd margin down.

    Returns:
        None for rectangles, which no processor of transformers prepares in this way.
    """
    height, width = model.image_sides
    if height != width:
        return None
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": model.in_chans == 3,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(height / images.crop)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.mean,
        "image_std": images.std,
    }
