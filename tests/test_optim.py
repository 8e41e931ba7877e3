"""Schedule, rates and groups by the Swin recipes."""

import pytest
import torch

from swin_moe.config import ModelConfig, MoEConfig, OptimizerConfig, ScheduleConfig
from swin_moe.models import SwinTransformer
from swin_moe.optim import build_optimizer, build_schedule, decays, parameter_groups


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


def test_groups_split_experts_and_decay():
    model = SwinTransformer(
        ModelConfig(img_size=32, embed_dim=8, depths=[1, 2], num_heads=[1, 2], ape=True),
        MoEConfig(blocks=[[], [1]], num_experts=2, router="cosine"),
    )
    groups = parameter_groups(model, 0.1)
    assert [(g["moe"], g["weight_decay"]) for g in groups] == [
        (False, 0.1), (False, 0.0), (True, 0.1), (True, 0.0)
    ]  # fmt: skip
    total = sum(p.numel() for group in groups for p in group["params"])
    assert total == sum(p.numel() for p in model.parameters())
    names = {name: decays(name, p) for name, p in model.named_parameters()}
    assert not any(decayed for name, decayed in names.items() if "cpb_mlp" in name)
    assert not names["layers.1.blocks.1.mlp.experts.fc1.bias"]  # two-dimensional, yet a bias
    assert not names["layers.1.blocks.1.mlp.router.sim_matrix"]
    assert not names["absolute_pos_embed"]
    assert names["layers.1.blocks.1.mlp.experts.fc1.weight"]
    assert names["layers.0.downsample.reduction.weight"]
