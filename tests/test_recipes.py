"""Every recipe and variant is as published; parameters and GMACs are those of the tables."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from swin_moe import build_model, list_models
from swin_moe.cli.models import models_table
from swin_moe.config import ConfigError, idle_keys, load_config, validate
from swin_moe.config.variants import PUBLISHED, VARIANTS
from swin_moe.models.cost import count
from swin_moe.moe import lost_gate

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("_"))


def cost(name):
    config = validate({"model": {"name": name}})
    return count(config.model, config.moe)


def printed_like(value, printed):
    """``value`` with as many decimals, or as many significant digits, as a table prints."""
    if "e" in printed:
        digits = len(printed.split("e")[0].replace(".", "")) - 1
        return f"{value:.{digits}e}".replace("e+0", "e")
    return f"{value:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables(name):
    published, found = PUBLISHED[name], cost(name)
    assert printed_like(found.parameters / 1e6, published.parameters) == published.parameters
    if published.gmacs:
        assert printed_like(found.macs / 1e9, published.gmacs) == published.gmacs
    if "expert" not in name:
        assert found.activated == found.parameters


@pytest.mark.parametrize("family", ["swin_moe", "swinv2_moe"])
@pytest.mark.parametrize(("size", "experts"), [("small", 8), ("small", 64), ("base", 32)])
def test_top1_activates_what_the_dense_model_has(family, size, experts):
    found = cost(f"{family}_{size}_{experts}expert_window12_192_22k")
    dense = cost(f"swinv2_{size}_window12_192_22k")
    assert found.activated == pytest.approx(dense.parameters, rel=0.005)
    assert found.macs == pytest.approx(dense.macs, rel=0.006)


# What was published, key by key; below that, what ours do otherwise and why.
AUGMENTATION = {
    "augment.auto_augment": "rand-m9-mstd0.5-inc1", "augment.color_jitter": 0.4,
    "augment.interpolation": "bicubic", "augment.random_erase": 0.25, "augment.mixup": 0.8,
    "augment.cutmix": 1.0, "augment.mixup_prob": 1.0, "augment.mixup_switch_prob": 0.5,
    "augment.label_smoothing": 0.1, "augment.hflip": 0.5, "augment.eval_crop": 224 / 256,
}  # fmt: skip
PRETRAINING = {  # ImageNet-22K, Swin V2
    "model.num_classes": 21841, "model.img_size": 192, "model.window_size": 12,
    "model.drop_path_rate": 0.2, "schedule.epochs": 90, "schedule.warmup_epochs": 5,
    "optimizer.base_lr": 1.25e-4, "schedule.warmup_lr": 1.25e-7, "schedule.min_lr": 1.25e-6,
    "optimizer.weight_decay": 0.1, "optimizer.clip_norm": 5.0, "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8, "optimizer.layer_decay": 1.0, "data.batch_size": 4096 // 32,
    **AUGMENTATION,
}  # fmt: skip
MIXTURE = {
    **PRETRAINING, "schedule.warmup_epochs": 10, "optimizer.clip_norm": 3.0, "moe.top_k": 1,
    "moe.blocks": [[], [], [1, 3, 5, 7, 9, 11, 13, 15, 17], [1]], "moe.router": "linear",
    "moe.capacity_factor": 1.25, "moe.balance": "importance_load", "moe.aux_loss_weight": 0.01,
    "moe.drop_rate": 0.1, "moe.init_std": 0.005, "moe.fc2_bias": False, "moe.gate_noise": 1.0,
    "moe.normalize_gate": False, "moe.batch_prioritized": True, "model.init_std": 0.005,
    "model.mlp_fc2_bias": False,
}  # fmt: skip
DROPLESS = {"moe.eval_capacity_factor": 0.0}  # 1.25 there: a result must not depend on the batch
ON_V2 = {  # Swin-MoE's placement and recipe on Swin V2, which nobody has published
    **DROPLESS,
    "moe.gate_after_norm": True,  # else its norm takes the gate, and the router does not learn
    "model.init_std": 0.02,  # dense layers are Swin V2's own, so that its weights fit
    "model.mlp_fc2_bias": True,
}
LARGE = {  # Swin V2 H and G: no recipe is published
    **ON_V2, "moe.drop_rate": 0.0, "moe.init_std": 0.02, "moe.fc2_bias": True,
}  # fmt: skip
PLAIN = {  # of small grey images that are upright and fill the frame
    "augment.auto_augment": "", "augment.color_jitter": 0.0, "augment.random_erase": 0.0,
    "augment.mixup": 0.0, "augment.cutmix": 0.0, "augment.eval_crop": 1.0,
}  # fmt: skip
MASKED = {  # SimMIM: its masks, crops and optimizer; the rest as MICRO
    "task.name": "simmim", "task.mask_ratio": 0.6, "task.mask_unit": 8,
    "task.norm_target_size": 0, "model.num_classes": 0, "augment.scale": [0.67, 1.0],
    "augment.hflip": 0.5, "augment.auto_augment": "", "augment.color_jitter": 0.0,
    "augment.random_erase": 0.0, "augment.mixup": 0.0, "augment.cutmix": 0.0,
    "moe.gate_after_norm": True, "optimizer.weight_decay": 0.05, "optimizer.clip_norm": 5.0,
}  # fmt: skip
LAPTOP = {  # so small and short that two CPU cores show it
    **DROPLESS, **PLAIN, "model.num_classes": 10, "model.img_size": 64, "model.window_size": 8,
    "model.drop_path_rate": 0.0, "schedule.epochs": 1, "schedule.warmup_epochs": 0.02,
    "optimizer.base_lr": 2e-3, "schedule.warmup_lr": 1e-5, "schedule.min_lr": 1e-5,
    "data.batch_size": 32,
}  # fmt: skip
MICRO = {  # ours, by docs/learning.md; it is nobody's published recipe
    **PLAIN, **ON_V2, "model.num_classes": 10, "model.img_size": 32, "model.window_size": 4,
    "model.drop_path_rate": 0.05, "schedule.epochs": 12, "schedule.warmup_epochs": 1,
    "optimizer.base_lr": 6e-3, "schedule.warmup_lr": 1e-5, "schedule.min_lr": 1e-5,
    "optimizer.weight_decay": 0.05, "optimizer.clip_norm": 5.0, "data.batch_size": 50,
    "moe.blocks": [[], [0, 1], [0, 1]], "moe.balance": "gshard", "moe.drop_rate": 0.0,
    "moe.init_std": 0.02, "moe.fc2_bias": True,
}  # fmt: skip


def expected_of(path):
    """All that must stand in a recipe."""
    name = path.stem
    base = {"model.drop_path_rate": 0.3} if "moe_base" in name else {}
    if path.parent.name == "imagenet22k" and "moe" not in name:
        return PRETRAINING
    if path.parent.name == "imagenet22k":
        experts = {"moe.num_experts": int(re.search(r"(\d+)expert", name)[1])}
        return {**MIXTURE, **base, **experts, **(ON_V2 if "v2" in name else DROPLESS)}
    every_second = [[], [], list(range(1, 42, 2)), [1, 3]]
    return {
        "swin_moe_micro": {**MIXTURE, **MICRO, "moe.num_experts": 8},
        "simmim_micro": {**MASKED, "moe.num_experts": 8},
        "swin_moe_1b": {**MIXTURE, **DROPLESS, "moe.num_experts": 64},
        "swin_moe_1b_laptop": {**MIXTURE, **LAPTOP, "moe.num_experts": 64},
        # Smaller micro-batches, for memory; the batch is that of as many GPUs as there are.
        "swin_moe_13b": {**MIXTURE, **LARGE, "moe.num_experts": 64, "data.batch_size": 64},
        "swin_moe_100b": {**MIXTURE, **LARGE, "moe.num_experts": 128, "data.batch_size": 32,
                          "moe.blocks": every_second},
        "swinv2_g_3b": {**PRETRAINING, "data.batch_size": 32},
    }[name]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_those_that_were_published(path):
    config = load_config(path)
    found = count(config.model, config.moe)
    assert found.parameters >= found.activated > 0
    expected = expected_of(path)
    values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1])
              for key in expected}  # fmt: skip
    assert values == expected
    assert not lost_gate(config.moe, config.model.family == "swinv2")
    assert not idle_keys(config)


# Image, window and drop path of the official configs, by name; experts have theirs above.
SHAPES = {
    r"swin_tiny_patch4_window7_224": (224, 7, 0.2),
    r"swin_small_patch4_window7_224": (224, 7, 0.3),
    r"swin_base_patch4_window7_224": (224, 7, 0.5),
    r"swin_base_patch4_window12_384": (384, 12, 0.5),
    r"swin_tiny_patch4_window7_224_22k(to1k)?": (224, 7, 0.1),
    r"swin_(small|base|large)_patch4_window7_224_22k(to1k)?": (224, 7, 0.2),
    r"swin_(base|large)_patch4_window12_384_22k(to1k)?": (384, 12, 0.2),
    r"swin_tiny_c24_patch4_window8_256": (256, 8, 0.2),
    r"swin_mlp_tiny_c\d+_patch4_window8_256": (256, 8, 0.2),
    r"swin_mlp_base_patch4_window7_224": (224, 7, 0.5),
    **{rf"swinv2_{size}_window{window}_256": (256, window, drop)
       for size, drop in (("tiny", 0.2), ("small", 0.3), ("base", 0.5)) for window in (8, 16)},
    # Tiny and small were not pretrained there, H, G and SimMIM's g are unpublished: as base.
    r"swinv2_(tiny|small|base|large)_window12_192_22k": (192, 12, 0.2),
    r"swinv2_(huge|giant|simmim_giant)_window12_192": (192, 12, 0.2),
    r"swinv2_(base|large)_window12to16_192to256_22kto1k": (256, 16, 0.2),
    r"swinv2_(base|large)_window12to24_192to384_22kto1k": (384, 24, 0.2),
    r"swin_moe_(small|base)_dense_window12_192_22k": (192, 12, 0.2),
    r"swin(v2)?_moe_small_\d+expert_window12_192_22k(_cosine)?": (192, 12, 0.2),
    r"swin(v2)?_moe_base_\d+expert_window12_192_22k(_cosine)?": (192, 12, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_those_that_were_published(name):
    config = validate({"model": {"name": name}})
    (shape,) = [shape for pattern, shape in SHAPES.items() if re.fullmatch(pattern, name)]
    model, moe = config.model, config.moe
    assert (model.img_size, model.window_size, model.drop_path_rate) == shape
    assert model.pretrained_window_sizes == ([12, 12, 12, 6] if "12to" in name else [])
    assert model.num_classes == (21841 if name.endswith(("22k", "cosine")) else 1000)
    assert moe.enabled == ("expert" in name)
    assert not lost_gate(moe, model.family == "swinv2")
    if moe.enabled:
        ours = ON_V2 if name.startswith("swinv2") else DROPLESS
        keys = {key: value for key, value in {**MIXTURE, **ours}.items() if key[:4] == "moe."}
        keys["moe.router"] = "cosine" if name.endswith("cosine") else "linear"
        assert {key: getattr(moe, key[4:]) for key in keys} == keys


def test_recipes_asked_for_are_there():
    names = {path.stem for path in RECIPES}
    assert {f"swinv2_{size}" for size in ("tiny", "small", "base", "large")} <= names
    for family in ("swin_moe", "swinv2_moe"):
        rows = {f"{family}_{s}_{n}expert" for s in ("small", "base") for n in (8, 16, 32, 64)}
        assert rows <= names


# Millions of parameters, and of those that one token meets, as the files' comments have them.
SCALE = {
    "swin_moe_1b": (1033, 66),
    "swin_moe_1b_laptop": (1016, 49),
    "swinv2_g_3b": (3087, 3087),
    "swin_moe_13b": (13712, 718),
    "swin_moe_100b": (126707, 3094),
}


@pytest.mark.parametrize("name", SCALE)
def test_the_billions_build_on_the_meta_device(name):
    config = load_config(ROOT / f"configs/scale/{name}.yaml")
    found = count(config.model, config.moe)
    assert (round(found.parameters / 1e6), round(found.activated / 1e6)) == SCALE[name]


def test_every_recipe_of_scale_is_counted():
    assert {path.stem for path in RECIPES if path.parent.name == "scale"} == SCALE.keys()


def test_the_table_of_models():
    text = Console(width=120, record=True, file=io.StringIO())
    text.print(models_table("swinv2_tiny*"))
    printed = text.export_text()
    assert all(name in printed for name in list_models("swinv2_tiny*"))
    row = r"swinv2_tiny_window16_256 +256/16 +28\.347 +28\.347 +6\.605 +6\.61 +82\.8"
    assert re.search(row, printed)
    with pytest.raises(ValueError, match="did you mean swinv2_tiny"):
        models_table("swinv2_tinny_window8_256")


def test_build_model_and_list_models():
    assert "swinv2_tiny_window8_256" in list_models("swinv2_tiny*")
    assert all(name.startswith("swin_moe") for name in list_models("swin_moe*"))
    model = build_model("swinv2_tiny_window8_256", num_classes=3, depths=[1, 1, 1, 1])
    assert model.head.out_features == 3
    with pytest.raises(ConfigError, match="swin-moe models"):
        build_model("resnet50")
    with pytest.raises(ConfigError, match="did you mean swinv2_base_window16_256"):
        build_model("swinv2_base_window16_265")
    with pytest.raises(ConfigError, match="window_size"):
        build_model("swinv2_tiny_window8_256", windows_size=3)
