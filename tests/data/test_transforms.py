import io
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from swin_moe.config import AugmentConfig
from swin_moe.data.decode import EncodedImage
from swin_moe.data.normalise import Normalise
from swin_moe.data.rng import seeded
from swin_moe.data.transforms import build_transform, cut, image_mode

from .helpers import NO_AUGMENT

POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9", "original", "v0", "3a", "augmix-m3", ""]


def _image(in_chans: int, size=(40, 30)) -> tuple[Image.Image, bytes]:
    """Return an image and its PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(image_mode(in_chans))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image, buffer.getvalue()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_training_shapes(in_chans, policy):
    augment = AugmentConfig(auto_augment=policy)
    transform = build_transform(augment, (32, 24), in_chans, [0.5] * in_chans, True)
    _, data = _image(in_chans)
    seen = set()
    for draw in range(60):  # enough for each operation of a policy to occur
        with seeded(draw):
            out = transform(data)
        assert out.shape == (32, 24, in_chans)
        assert out.dtype == np.uint8
        seen.add(out.tobytes())
    assert len(seen) > 50


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("sides", [(28, 28), (24, 40)])
def test_evaluation_is_what_timm_does(in_chans, sides):
    image, data = _image(in_chans, size=(64, 70))
    transform = build_transform(AugmentConfig(), sides, in_chans, [0.5] * in_chans, False)
    theirs = create_transform(sides, crop_pct=0.875, interpolation="bicubic", mean=0.0, std=1.0)
    expected = (theirs(image) * 255).round().byte().permute(1, 2, 0)
    np.testing.assert_array_equal(transform(data), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(300, 220), (40, 30)])
def test_training_is_what_timm_does(size, interpolation):
    """Draws, crop, flip and policy are timm's; pixels differ by a level or two from resizing."""
    image, data = _image(3, size)
    settings = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": interpolation}
    mine = build_transform(AugmentConfig(**settings), (64, 64), 3, [0.5] * 3, True)
    theirs = create_transform(
        64, is_training=True, mean=[0.5] * 3, std=[0.5] * 3, use_prefetcher=True, **settings
    )
    differences = []
    for draw in range(40):
        with seeded(draw):
            ours = mine(data).astype(int)
        with seeded(draw):
            expected = theirs(image).permute(1, 2, 0).numpy()
        differences.append(np.abs(ours - expected).mean())
    # Equalize and similar operations amplify a difference of one level.
    assert np.median(differences) < 0.02
    assert max(differences) < 2


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(monkeypatch):
    rows, columns = np.mgrid[:900, :1200]
    pixels = np.stack([rows % 256, columns % 256, (rows + columns) // 9 % 256], -1).astype(np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(6))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    transform = build_transform(NO_AUGMENT, (128, 128), 3, [0.5] * 3, True)
    decoded = []
    pixels_of = EncodedImage.pixels

    def watched(self, at_least=None):
        decoded.append(pixels_of(self, at_least))
        return decoded[-1]

    monkeypatch.setattr(EncodedImage, "pixels", watched)
    out = transform(buffer.getvalue())
    assert decoded[0].shape == (225, 300, 3)  # a quarter: an eighth would be too few
    expected = image.crop((150, 0, 1050, 900)).resize((128, 128), Image.Resampling.BICUBIC)
    assert np.abs(out.astype(int) - np.asarray(expected)).mean() < 1


@pytest.mark.parametrize("training", [True, False])
def test_without_augmentation_or_crop_the_pixels_stay(training):
    augment = NO_AUGMENT.model_copy(update={"eval_crop": 1.0})
    transform = build_transform(augment, (28, 28), 3, [0.5] * 3, training)
    image, data = _image(3, size=(28, 28))
    np.testing.assert_array_equal(transform(data), np.asarray(image))


def test_cut_stays_within_a_reduced_image():
    pixels = np.arange(5 * 4).reshape(5, 4, 1)
    assert cut(pixels, (0, 0, 40, 32), (40, 32)).shape == (5, 4, 1)
    assert cut(pixels, (8, 16, 16, 8), (40, 32)).tolist() == [[[6]], [[10]]]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_normalise(in_chans):
    images = torch.randint(0, 256, (5, in_chans, 6, 7), dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6][:in_chans], [0.2, 0.3, 0.4][:in_chans]
    expected = (images / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    out = Normalise(mean, std)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_posterize_survives_extreme_magnitudes():
    """Pillow 13 refuses the 0 bits of timm's magnitudes from 10 on; 12 does not."""
    with seeded(0):
        for _ in range(2000):
            operation = AugmentOp("PosterizeIncreasing", 1.0, random.uniform(8, 12))
            operation(_TINY)


def test_default_recipe_survives_many_draws():
    policy = rand_augment_transform(
        AugmentConfig().auto_augment, {"translate_const": 3, "img_mean": (124, 116, 104)}
    )
    with seeded(1):
        for _ in range(2000):
            policy(_TINY)


_TINY = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


@pytest.mark.parametrize("policy", ["rand-x9", "nonsense"])
def test_unknown_policy(policy):
    with pytest.raises(ValueError, match=rf"augment\.auto_augment='{policy}"):
        build_transform(AugmentConfig(auto_augment=policy), (8, 8), 3, [0.0] * 3, True)


def test_unsupported_channels():
    with pytest.raises(ValueError, match=r"model\.in_chans=4"):
        image_mode(4)


@pytest.mark.parametrize(
    ("policy", "known"),
    [
        ("rand-m9-mstd0.5-inc1", True), ("rand-m9-tweights", True), ("original-mstd0.5", True),
        ("augmix-m5-w4-d2", True), ("", True), ("rand-mX", False), ("rand-m9-", False),
        ("augmix-m", False), ("original-t1-x", False),
    ],
)  # fmt: skip
def test_a_policy_is_read_to_its_end(policy, known):
    """timm ignores parts without a number."""
    augment = AugmentConfig(auto_augment=policy)
    with nullcontext() if known else pytest.raises(ValueError, match="is not a policy of timm"):
        build_transform(augment, (32, 32), 3, (0.5, 0.5, 0.5), training=True)
