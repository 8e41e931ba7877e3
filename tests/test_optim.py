"""Schedule, rates and groups by the Swin recipes."""

import re

import pytest
import torch

from swin_moe.config import Config, ModelConfig, MoEConfig, OptimizerConfig, ScheduleConfig
from swin_moe.models import SimMIM, SwinTransformer
from swin_moe.training.optim import (
    build_optimizer,
    build_schedule,
    decays,
    layer_id,
    parameter_groups,
)
from tests.golden import Golden

TINY = {"img_size": 32, "embed_dim": 8, "num_heads": [1, 2, 4, 8], "depths": [2, 2, 6, 2]}
# Prefix of a name -> layer, in a model of depths [2, 2, 6, 2]
LAYERS = {
    "patch_embed.": 0, "mask_token": 0, "absolute_pos_embed": 13,
    "layers.0.blocks.0.": 1, "layers.0.blocks.1.": 2, "layers.0.downsample.": 2,
    "layers.1.blocks.0.": 3, "layers.1.blocks.1.": 4, "layers.1.downsample.": 4,
    "layers.2.blocks.0.": 5, "layers.2.blocks.1.": 6, "layers.2.blocks.2.": 7,
    "layers.2.blocks.3.": 8, "layers.2.blocks.4.": 9, "layers.2.blocks.5.": 10,
    "layers.2.downsample.": 10, "layers.3.blocks.0.": 11, "layers.3.blocks.1.": 12,
    "norm.": 13, "head.": 13, "decoder.": 13,
}  # fmt: skip


def build(family="swinv2", moe=None, **changes):
    return SwinTransformer(ModelConfig(family=family, **{**TINY, **changes}), moe)


def moe_model(**changes):
    moe = MoEConfig(blocks=[[], [1], [0, 5]], num_experts=2, router="cosine")
    return build("swin_moe", moe, ape=True, **changes)


def simmim():
    return SimMIM(moe_model(num_classes=0))


def test_rate_scales_with_the_batch_and_follows_warmup_and_cosine():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer([{"params": [parameter]}], OptimizerConfig(base_lr=1e-3), 1024)
    recipe = ScheduleConfig(epochs=10, warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-5)
    schedule = build_schedule(optimizer, recipe, steps_per_epoch=5, global_batch=1024)
    rates = []
    for step in range(51):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(2e-6)
    assert rates[10] == pytest.approx(2e-3)  # base_lr · 1024 / 512
    assert rates[30] == pytest.approx((2e-3 + 2e-5) / 2)
    assert rates[50] == pytest.approx(2e-5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_layer_decay_scales_the_whole_schedule():
    """Rates of the groups keep their ratios before the first update, in the warm-up and later."""
    recipe = ScheduleConfig(epochs=4, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5)
    optimizers, schedules = [], []
    for layer_decay in (1.0, 0.8):
        config = OptimizerConfig(base_lr=1e-3, layer_decay=layer_decay)
        groups = parameter_groups(build(), config.weight_decay, layer_decay)
        optimizers.append(build_optimizer(groups, config, 1024))
    plain, scaled = optimizers
    assert {group["lr"] for group in plain.param_groups} == {2e-3}
    for step in range(-1, 16):
        if step == 0:
            schedules = [build_schedule(o, recipe, 4, 1024) for o in optimizers]
        for schedule in schedules:
            schedule.step_update(step)
        rate = plain.param_groups[0]["lr"]
        assert [g["lr"] for g in scaled.param_groups] == pytest.approx(
            [rate * g["lr_scale"] for g in scaled.param_groups]
        )
        assert max(g["lr"] for g in scaled.param_groups) == rate
    assert {round(g["lr_scale"], 9) for g in scaled.param_groups} == {
        round(0.8**n, 9) for n in range(14)
    }


@pytest.mark.parametrize(("make", "prefix"), [(moe_model, ""), (simmim, "encoder.")])
def test_layer_ids(make, prefix):
    """Every parameter has the layer of the list above."""
    seen = set()
    for name, _ in make().named_parameters():
        (match,) = (p for p in LAYERS if name.removeprefix(prefix).startswith(p))
        assert layer_id(name, [2, 2, 6, 2]) == LAYERS[match], name
        seen.add(match)
    assert seen == set(LAYERS) - ({"head."} if prefix else {"mask_token", "decoder."})


@pytest.mark.parametrize("make", [moe_model, simmim])
def test_groups_by_layer(make):
    model = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = []
    for group in parameter_groups(model, 0.1, 0.8):
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert group["lr_scale"] == 0.8 ** (13 - layer_id(name, [2, 2, 6, 2]))
            assert group["weight_decay"] == (0.1 if decays(name, parameter) else 0.0)
            assert group["moe"] == (".experts." in name)
        places.append((group["moe"], group["weight_decay"], group["lr_scale"]))
    assert not names
    assert len(set(places)) == len(places)
    assert sum(moe for moe, _, _ in places) == 2 * 3


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.1])
def test_layer_decay_has_bounds(layer_decay):
    with pytest.raises(ValueError, match="layer_decay"):
        Config(optimizer=OptimizerConfig(layer_decay=layer_decay))


def test_groups_split_experts_and_decay():
    model = SwinTransformer(
        ModelConfig(img_size=32, embed_dim=8, depths=[1, 2], num_heads=[1, 2], ape=True),
        MoEConfig(blocks=[[], [1]], num_experts=2, router="cosine"),
    )
    groups = parameter_groups(model, 0.1)
    assert [(g["moe"], g["weight_decay"]) for g in groups] == [
        (False, 0.1), (False, 0.0), (True, 0.1), (True, 0.0)
    ]  # fmt: skip
    assert not any("lr_scale" in group for group in groups)
    order = {id(p): place for place, p in enumerate(model.parameters())}
    for group in groups:
        places = [order[id(p)] for p in group["params"]]
        assert places == sorted(places)
    total = sum(p.numel() for group in groups for p in group["params"])
    assert total == sum(p.numel() for p in model.parameters())
    names = {name: decays(name, p) for name, p in model.named_parameters()}
    assert not any(decayed for name, decayed in names.items() if "cpb_mlp" in name)
    assert not names["layers.1.blocks.1.mlp.experts.fc1.bias"]  # two-dimensional, yet a bias
    assert not names["layers.1.blocks.1.mlp.router.sim_matrix"]
    assert not names["absolute_pos_embed"]
    assert names["layers.1.blocks.1.mlp.experts.fc1.weight"]
    assert names["layers.0.downsample.reduction.weight"]


def test_no_decay_equals_the_official_list():
    """Also under ``encoder.``, where the official keywords match no other parameter."""
    golden = Golden("train_trajectory_swinv2")
    official = set(golden.config["no_decay_parameters"])
    config = ModelConfig(**golden.config["arguments"])
    assert undecayed(SwinTransformer(config)) == official
    wrapped = SimMIM(SwinTransformer(config.model_copy(update={"num_classes": 0})))
    expected = {f"encoder.{name}" for name in official - {"head.bias"}}
    assert undecayed(wrapped) == expected | {"encoder.mask_token", "decoder.0.bias"}


def undecayed(model):
    return {name for name, p in model.named_parameters() if not decays(name, p)}


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("swin", {"attn.relative_position_bias_table"}),
        ("swinv2", {"attn.cpb_mlp.0.weight", "attn.cpb_mlp.2.weight", "attn.logit_scale"}),
        ("swin_mlp", set()),
        ("swin_moe", {"attn.cpb_mlp.0.weight", "attn.cpb_mlp.2.weight"}),
    ],
)
@pytest.mark.parametrize("router", ["", "linear", "cosine"])
def test_no_decay_by_family(family, router, kinds):
    """These have two or more dimensions and no decay; 1-D tensors never have decay."""
    moe = MoEConfig(blocks=[[1]], num_experts=2, router=router) if router else None
    model = build(family, moe, ape=True, extra_norm_every_n_blocks=2)
    kinds = kinds | {"absolute_pos_embed"}
    if router:
        kinds |= {"mlp.experts.fc1.bias", "mlp.experts.fc2.bias"}
    if router == "cosine":
        kinds |= {"mlp.router.cosine_projector.weight", "mlp.router.sim_matrix"}
    flat = {name for name, p in model.named_parameters() if p.ndim <= 1}
    assert undecayed(model) >= flat
    found = {re.sub(r"layers\.\d+\.blocks\.\d+\.", "", n) for n in undecayed(model) - flat}
    assert found == kinds
