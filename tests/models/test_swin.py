"""Shapes, resolutions, windows and the seams of the backbone."""

import pytest
import torch

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import MoEOutput, SwinTransformer
from swin_moe.models.attention import relative_coords, relative_index
from swin_moe.ops import window_attention

TINY = {"img_size": 32, "patch_size": 2, "in_chans": 3, "num_classes": 5, "embed_dim": 8,
        "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.0}  # fmt: skip


def awake(model):
    """Block norms start at zero, which hides the blocks: set them to one."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
    return model.eval()


def test_a_fresh_block_is_the_identity():
    model = SwinTransformer(ModelConfig(**TINY)).eval()
    x = torch.randn(1, 16, 16, 8)
    block = model.layers[0].blocks[1]
    assert torch.equal(block(x)[0], x)


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (30, 41), (6, 64), (2, 2)])
def test_any_image_size(size):
    model = awake(SwinTransformer(ModelConfig(**TINY)))
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_padding_does_not_leak_into_the_result():
    """A padded window gives what attention over its real tokens alone gives."""
    torch.manual_seed(0)
    qkv, bias = torch.randn(1, 3, 4, 3, 2, 8), torch.randn(2, 16, 16)
    scale = torch.full((2, 1, 1), 2.0)
    out = window_attention(qkv, bias, scale, window_size=4)
    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    logits = q @ k.transpose(-2, -1) * scale.exp() + bias[:, :12, :12]
    expected = (logits.softmax(-1) @ v).transpose(1, 2).reshape(1, 3, 4, 16)
    torch.testing.assert_close(out, expected)


def test_shifted_windows_do_not_see_across_the_border():
    """Far corners share a shifted window; −100 keeps them apart at ordinary logits."""
    qkv = torch.randn(1, 8, 8, 3, 1, 8)
    changed = qkv.clone()
    changed[:, :2, :2, 1:] += 1.0  # k and v of the top left corner
    arguments = (torch.zeros(1, 16, 16), torch.zeros(1, 1, 1))
    a, b = (window_attention(t, *arguments, window_size=4, shift_size=2) for t in (qkv, changed))
    assert not torch.allclose(a[:, :2, :2], b[:, :2, :2])
    torch.testing.assert_close(a[:, 2:], b[:, 2:])
    torch.testing.assert_close(a[:, :2, 2:], b[:, :2, 2:])


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
    with pytest.raises(ValueError, match="dimension 3 must be 3"):
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


def test_moe_blocks_take_the_place_of_dense_ones():
    moe = MoEConfig(blocks=[[1], [0, 1]], num_experts=4)
    model = awake(SwinTransformer(ModelConfig(**TINY), moe))
    assert model.moe_layer_names() == [
        "layers.0.blocks.1",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
    ]
    output = model(torch.randn(2, 3, 32, 32))
    assert isinstance(output, MoEOutput)
    assert output.counts.shape == (3, 4)
    assert output.counts.sum(1).tolist() == [2 * 256, 2 * 64, 2 * 64]
    assert output.aux_loss.ndim == 0
    with pytest.raises(ValueError, match="names block 2"):
        SwinTransformer(ModelConfig(**TINY), MoEConfig(blocks=[[2]]))


def test_evaluation_does_not_depend_on_the_batch():
    model = awake(SwinTransformer(ModelConfig(**TINY), MoEConfig(blocks=[[1], [1]], num_experts=4)))
    images = torch.randn(3, 3, 32, 32)
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-4, atol=1e-5)


def test_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = SwinTransformer(
            ModelConfig(embed_dim=512, depths=[2, 2, 42, 4], num_heads=[16] * 4)
        )
    assert sum(p.numel() for p in model.parameters()) > 2.9e9
