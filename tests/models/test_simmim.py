"""SimMIM equals the official implementation; its masks, losses and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import SimMIM, SwinTransformer
from swin_moe.models.simmim import absolute_error, masked_l1_loss, norm_target, random_mask
from tests.golden import Golden
from tests.models.test_golden import BUFFERS

TINY = ModelConfig(
    img_size=32, patch_size=2, num_classes=0, embed_dim=8, depths=[1, 2], num_heads=[1, 2],
    window_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    return Golden("simmim_swinv2")


def loss_of(model, images, mask, norm_target_size=47):
    reconstruction, patch = model(images, mask).predictions, model.config.patch_size
    return masked_l1_loss(*absolute_error(reconstruction, images, mask, patch, norm_target_size))


def load(golden):
    encoder = SwinTransformer(ModelConfig(**golden.config["arguments"]["encoder"]))
    model = SimMIM(encoder)
    state = {k: v for k, v in golden.weights.items() if not k.endswith(BUFFERS)}
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def test_every_tensor_equals_official(golden):
    model = load(golden)
    images, mask = golden.io["input"], golden.io["mask"]
    golden.check("patch_embed", model.encoder.patch_embed(images).flatten(1, 2))
    x = model.embed(images, mask)
    golden.check("masked_tokens", x.flatten(1, 2))
    for index, layer in enumerate(model.encoder.layers):
        x, _ = layer(x)
        golden.check(f"stage{index}", x.flatten(1, 2))
    golden.check("encoder_out", model.encoder.norm(x).permute(0, 3, 1, 2))
    golden.check("norm_target", norm_target(images))
    output = model(images, mask)
    golden.check("reconstruction", output.predictions)
    golden.check("loss", loss_of(model, images, mask).view(1))
    golden.check("loss_raw_target", loss_of(model, images, mask, 0).view(1))
    assert output.aux_loss is None
    arguments = golden.config["arguments"]
    assert model.decoder[1].upscale_factor == arguments["encoder_stride"]
    assert arguments["norm_target_patch_size"] == 47


@pytest.mark.parametrize(("height", "width"), [(12, 9), (3, 5), (1, 1)])
def test_target_equals_its_definition(height, width):
    """Mean and unbiased variance of each neighbourhood, pixel by pixel, smaller images included."""
    torch.manual_seed(0)
    images = torch.randn(1, 2, height, width, dtype=torch.float64)
    target = norm_target(images, 5)
    for y in range(height):
        for x in range(width):
            around = images[..., max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].flatten(2)
            variance = around.var(-1) if around.shape[-1] > 1 else 0.0
            expected = (images[..., y, x] - around.mean(-1)) / (variance + 1e-6) ** 0.5
            torch.testing.assert_close(target[..., y, x], expected)


def test_only_masked_pixels_count():
    model = SimMIM(SwinTransformer(TINY)).eval()
    images = torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 16, 16)
    assert loss_of(model, images, mask, 0) == 0
    mask[0, 3, 5] = 1
    output = model(images, mask)
    error = (images - output.predictions)[..., 6:8, 10:12].abs().mean()
    torch.testing.assert_close(loss_of(model, images, mask, 0), error, rtol=1e-4, atol=0.0)
    other = images.clone()
    other[..., 6:8, 10:12] += 1.0  # what is masked is not seen
    assert torch.equal(model(other, mask).predictions, output.predictions)


def test_any_image_size():
    model = SimMIM(SwinTransformer(TINY)).eval()
    images = torch.randn(2, 3, 30, 41)
    mask = torch.ones(2, 15, 21, dtype=torch.bool)
    reconstruction = model(images, mask).predictions
    assert reconstruction.shape == images.shape
    expected = F.l1_loss(reconstruction, norm_target(images))
    torch.testing.assert_close(loss_of(model, images, mask), expected)


def test_position_embedding_comes_after_the_mask():
    """With everything masked, only it can tell one place of the image from another."""
    reconstructions = {}
    for ape in (False, True):
        model = SimMIM(SwinTransformer(TINY.model_copy(update={"ape": ape}))).eval()
        output = model(torch.randn(1, 3, 32, 32), torch.ones(1, 16, 16))
        reconstructions[ape] = output.predictions
    corner, other = (reconstructions[False][..., :4, p : p + 4] for p in (0, 16))
    torch.testing.assert_close(corner, other)
    corner, other = (reconstructions[True][..., :4, p : p + 4] for p in (0, 16))
    assert not torch.allclose(corner, other, atol=1e-3)


def test_balance_losses_of_moe_blocks_are_returned():
    moe = MoEConfig(blocks=[[], [1]], num_experts=4)
    model = SimMIM(SwinTransformer(TINY, moe))
    output = model(torch.randn(2, 3, 32, 32), torch.ones(2, 16, 16))
    assert output.aux_loss > 0
    output.aux_loss.backward()
    router = model.encoder.layers[1].blocks[1].mlp.router
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("ratio", "unit", "masked"),
    [(0.6, 32, 22), (0.5, 32, 18), (0.6, 64, 6), (0.0, 32, 0), (1.0, 32, 36)],
)
def test_mask_covers_whole_units(ratio, unit, masked):
    generator = torch.Generator().manual_seed(1)
    mask = random_mask(192, 192, patch_size=4, mask_unit=unit, ratio=ratio, generator=generator)
    assert mask.shape == (48, 48)
    side = unit // 4
    units = mask.unflatten(0, (-1, side)).unflatten(2, (-1, side)).float().mean((1, 3))
    assert set(units.unique().tolist()) <= {0.0, 1.0}
    assert units.sum() == masked


def test_masks_differ_and_repeat():
    generator = torch.Generator().manual_seed(1)
    draws = [random_mask(128, 64, patch_size=2, generator=generator) for _ in range(20)]
    assert draws[0].shape == (64, 32)
    assert {int(mask.sum()) for mask in draws} == {5 * 16 * 16}  # ⌈0.6·8⌉ units of 32 pixels
    assert any(not torch.equal(draws[0], mask) for mask in draws)
    assert torch.stack(draws).any(0).all()
    again = random_mask(128, 64, patch_size=2, generator=generator.manual_seed(1))
    assert torch.equal(again, draws[0])


def one_line(caught):
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 8, 8), (16, 16), (1, 16, 16)])
def test_mask_of_another_shape_is_refused(shape):
    model = SimMIM(SwinTransformer(TINY))
    with pytest.raises(ValueError, match=r"mask has shape .* expected \(2, 16, 16\)") as caught:
        model(torch.randn(2, 3, 32, 32), torch.ones(shape))
    one_line(caught)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 100}, "must divide the image's 100 × 192"),
        ({"patch_size": 5}, "multiple of patch_size=5"),
        ({"ratio": 1.5}, "ratio=1.5"),
    ],
)
def test_masks_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        random_mask(**{"height": 192, "width": 192, "patch_size": 4, **change})
    one_line(caught)


def test_what_simmim_does_not_take():
    with pytest.raises(ValueError, match="num_classes=0, not 7") as caught:
        SimMIM(SwinTransformer(TINY.model_copy(update={"num_classes": 7})))
    one_line(caught)
