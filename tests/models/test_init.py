"""Initial weights: their distributions, and equality after the meta device, bit for bit."""

import math

import pytest
import torch
from torch import nn

from swin_moe import build_model
from swin_moe.config import ConfigError, ModelConfig, MoEConfig
from swin_moe.models import SimMIM, SwinTransformer
from swin_moe.models.layers import Fp32Linear

TINY = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 8, "depths": [2, 2],
        "num_heads": [1, 2], "window_size": 4, "ape": True}  # fmt: skip
IMAGES = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
FAMILIES = ["swin", "swinv2", "swin_mlp", "swin_moe"]


def build(family="swinv2", router="", **changes):
    moe = MoEConfig(blocks=[[1], [0]], num_experts=4, router=router) if router else None
    return SwinTransformer(ModelConfig(**{**TINY, "family": family, **changes}), moe)


def simmim(router):
    return SimMIM(build("swinv2", router, num_classes=0))


def tensors(model):
    """Return every parameter and buffer, also those that are not saved."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def from_meta(make):
    """Build a model on the meta device, and give it memory with garbage."""
    with torch.device("meta"):
        model = make()
    assert {t.device.type for t in tensors(model).values()} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in tensors(model).values():
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    return model


def assert_equal_after_init(make, *inputs):
    models = [make(), from_meta(make)]
    for model in models:
        torch.manual_seed(3)
        model.init_weights()
    expected, found = map(tensors, models)
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, expected[name]), name
        if not tensor.is_floating_point():
            assert (tensor >= 0).all(), name
    with torch.no_grad():  # no other tensor is on the meta device
        outputs = [model.eval()(*inputs) for model in models]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize("router", ["", "linear", "cosine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_meta_model_becomes_the_same_model(family, router):
    assert_equal_after_init(lambda: build(family, router, extra_norm_every_n_blocks=2), IMAGES)


def test_meta_model_with_pretrained_windows_and_no_biases():
    changes = {"pretrained_window_sizes": [6, 6], "qkv_bias": False, "patch_norm": False}
    assert_equal_after_init(lambda: build(mlp_fc2_bias=False, **changes), IMAGES)


def test_pretrained_weights_for_a_model_without_memory_are_refused(tmp_path):
    torch.save(build().state_dict(), tmp_path / "x.pth")
    with torch.device("meta"), pytest.raises(ConfigError, match="pretrained has no effect under"):
        build_model("swinv2", pretrained=tmp_path / "x.pth", **TINY)


@pytest.mark.parametrize("router", ["", "linear"])
def test_meta_simmim_becomes_the_same_model(router):
    assert_equal_after_init(lambda: simmim(router), IMAGES, torch.ones(1, 16, 16))


def assert_std(tensor, std):
    """Check within five standard errors of a normal sample; truncation at ±2 has no effect."""
    error = 5 * std / math.sqrt(2 * tensor.numel())
    assert tensor.std().item() == pytest.approx(std, abs=error)
    assert tensor.mean().abs().item() <= 5 * std / math.sqrt(tensor.numel())


@pytest.mark.parametrize("init_std", [0.02, 0.005])
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_and_norms(family, init_std):
    torch.manual_seed(0)
    model = build(family, embed_dim=32, init_std=init_std, extra_norm_every_n_blocks=2)
    linears = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            assert_std(module.weight, init_std)
            assert module.bias is None or not module.bias.any(), name
            linears += 1
        elif isinstance(module, nn.LayerNorm):
            asleep = family == "swinv2" and name.endswith((".norm1", ".norm2"))
            assert (module.weight == (0.0 if asleep else 1.0)).all(), name
            assert not module.bias.any(), name
    assert linears >= 4 * 3 + 2
    assert_std(model.absolute_pos_embed, 0.02)
    bound = 1 / math.sqrt(3 * 2 * 2)  # Conv2d's own
    assert bound / 2 < model.patch_embed.proj.weight.abs().max() <= bound
    assert bound / 2 < model.patch_embed.proj.bias.abs().max() <= bound


def test_attention_parameters():
    model = build("swinv2")
    for layer in model.layers:
        for block in layer.blocks:
            assert (block.attn.logit_scale == math.log(10)).all()
            assert not block.attn.q_bias.any()
            assert not block.attn.v_bias.any()
            assert isinstance(block.attn.cpb_mlp[0], Fp32Linear)
    torch.manual_seed(0)
    model = build("swin", window_size=8, num_heads=[4, 8])
    assert_std(model.layers[0].blocks[0].attn.relative_position_bias_table, 0.02)


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_experts_and_routers(router):
    torch.manual_seed(0)
    moe = MoEConfig(blocks=[[1]], num_experts=4, router=router, init_std=0.005)
    mlp = SwinTransformer(ModelConfig(**{**TINY, "embed_dim": 32}), moe).layers[0].blocks[1].mlp
    for layer in (mlp.experts.fc1, mlp.experts.fc2):
        assert_std(layer.weight, 0.005)
        assert not layer.bias.any()
        assert not torch.equal(layer.weight[0], layer.weight[1])
    if router == "linear":
        assert_std(mlp.router.weight, 0.02)
    else:
        assert mlp.router.temperature.item() == pytest.approx(math.log(1 / 0.5))
        assert_std(mlp.router.sim_matrix, 0.01)
        assert_std(mlp.router.cosine_projector.weight, 0.02)
        assert not mlp.router.cosine_projector.bias.any()


def test_simmim_parameters():
    torch.manual_seed(0)
    model = SimMIM(build(embed_dim=64, num_classes=0))
    assert_std(model.encoder.mask_token, 0.02)
    bound = 1 / math.sqrt(model.encoder.num_features)
    for parameter in model.decoder.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound
