"""Shapes, resolutions, windows and the seams of the backbone."""

import pytest
import torch

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import Outputs, SwinTransformer
from swin_moe.models.position import relative_coords, relative_index, spread_bias_table
from swin_moe.moe import moe_layers
from swin_moe.ops import window_attention

TINY = {"img_size": 32, "patch_size": 2, "in_chans": 3, "num_classes": 5, "embed_dim": 8,
        "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.0}  # fmt: skip


def awake(model):
    """Block norms start at zero, which hides the blocks: set them to one."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
    return model.eval()


def lively(family="swinv2", moe=None, **overrides):
    """A tiny model, in eval mode, whose logits depend on every parameter."""
    torch.manual_seed(0)
    model = SwinTransformer(ModelConfig(family=family, **{**TINY, **overrides}), moe)
    for parameter in model.parameters():
        mean, std = (1.0, 0.1) if parameter.ndim == 1 else (0.0, 0.5)
        torch.nn.init.normal_(parameter, mean, std)
    return model.eval()


def test_a_fresh_block_is_the_identity():
    model = SwinTransformer(ModelConfig(**TINY)).eval()
    x = torch.randn(1, 16, 16, 8)
    block = model.layers[0].blocks[1]
    assert torch.equal(block(x)[0], x)


def test_window_attention_gradcheck_in_fp64():
    torch.manual_seed(0)
    qkv = torch.randn(1, 3, 5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, 1, 1, dtype=torch.float64, requires_grad=True)

    def run(*tensors):
        return window_attention(*tensors, window_size=2, shift_size=1)

    assert torch.autograd.gradcheck(run, (qkv, bias, scale))


def test_window_attention_checks_shapes():
    good = torch.randn(1, 4, 4, 3, 2, 8)
    with pytest.raises(ValueError, match="bias has shape"):
        window_attention(good, torch.zeros(2, 4, 4), torch.zeros(2, 1, 1), window_size=4)
    with pytest.raises(ValueError, match="qkv has shape"):
        window_attention(
            good[:, :, :, :2], torch.zeros(2, 16, 16), torch.zeros(2, 1, 1), window_size=4
        )


def test_coordinates_of_a_pretrained_window():
    own, larger = relative_coords(8), relative_coords(16, pretrained_window_size=8)
    assert own.abs().max() == pytest.approx(torch.log2(torch.tensor(9.0)).item() / 3)
    # The offsets that the pretrained window knew keep their coordinates.
    grid = larger.view(31, 31, 2)[8:23, 8:23].flatten(0, 1)
    torch.testing.assert_close(grid, own)
    assert relative_index(3).unique().numel() == 25
    assert relative_coords(1).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("window", [1, 4, 7])
def test_the_bias_of_pairs_is_the_tables_by_offset(window):
    table = torch.randn((2 * window - 1) ** 2, 3, dtype=torch.float64, requires_grad=True)
    bias, index = spread_bias_table(table, window), relative_index(window)
    assert torch.equal(bias, table[index].permute(2, 0, 1))
    assert bias.is_contiguous()
    weight = torch.randn_like(bias)
    (expected,) = torch.autograd.grad(table[index].permute(2, 0, 1), table, weight)
    (gradient,) = torch.autograd.grad(bias, table, weight)
    torch.testing.assert_close(gradient, expected)


def test_moe_blocks_take_the_place_of_dense_ones():
    moe = MoEConfig(blocks=[[1], [0, 1]], num_experts=4)
    model = awake(SwinTransformer(ModelConfig(**TINY), moe))
    assert list(moe_layers(model)) == [
        "layers.0.blocks.1",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
    ]
    output = model(torch.randn(2, 3, 32, 32))
    assert isinstance(output, Outputs)
    assert output.routing.counts.shape == (3, 4)
    assert output.routing.counts.sum(1).tolist() == [2 * 256, 2 * 64, 2 * 64]
    assert output.aux_loss.ndim == 0
    with pytest.raises(ValueError, match="names block 2"):
        SwinTransformer(ModelConfig(**TINY), MoEConfig(blocks=[[2]]))


def test_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = SwinTransformer(
            ModelConfig(embed_dim=512, depths=[2, 2, 42, 4], num_heads=[16] * 4)
        )
    assert sum(p.numel() for p in model.parameters()) > 2.9e9


def _router_gradient(**options):
    """Norm of the gradient that the task alone gives the router of a V2 block with top-1."""
    moe = MoEConfig(blocks=[[], [1]], num_experts=4, aux_loss_weight=0.0, gate_noise=0.0, **options)
    model = lively(moe=moe)
    torch.manual_seed(1)
    model(torch.randn(2, 3, 32, 32)).predictions.square().sum().backward()
    mlp = model.layers[1].blocks[1].mlp
    return (mlp.router.weight.grad.norm() / mlp.experts.fc2.weight.grad.norm()).item()


def test_the_post_norm_undoes_a_single_gate_unless_it_comes_after():
    assert _router_gradient(gate_after_norm=True) > 100 * _router_gradient()


def test_a_dropped_token_adds_nothing_with_the_gate_after_the_norm():
    moe = MoEConfig(blocks=[[1]], num_experts=4, gate_after_norm=True, capacity_factor=0.1)
    model = lively(moe=moe).train()
    block = model.layers[0].blocks[1]
    torch.nn.init.zeros_(block.norm1.weight)
    torch.nn.init.zeros_(block.norm1.bias)
    x = torch.randn(1, 16, 16, 8)
    out, routed = block(x)
    dropped = routed.scale[..., 0] == 0
    assert 0 < dropped.sum() < dropped.numel()
    assert torch.equal(out[dropped], x[dropped])


@pytest.mark.parametrize("other", [{"routing": "soft"}, {"num_shared_experts": 1}])
def test_the_gate_after_the_norm_is_refused_where_it_has_no_meaning(other):
    with pytest.raises(ValueError, match="gate_after_norm has no meaning"):
        MoEConfig(gate_after_norm=True, **other)


def test_the_gate_after_the_norm_needs_a_post_norm():
    moe = MoEConfig(blocks=[[1]], gate_after_norm=True)
    with pytest.raises(ValueError, match="needs the post-norm blocks"):
        SwinTransformer(ModelConfig(family="swin_moe", **TINY), moe)
