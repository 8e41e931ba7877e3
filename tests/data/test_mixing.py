import pytest
import torch

from swin_moe.config import AugmentConfig
from swin_moe.data.rng import seeded
from swin_moe.tasks.mixing import build_mixing

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def test_targets_are_distributions_and_step_decides():
    mix = build_mixing(AugmentConfig(), num_classes=5, seed=1)
    seen = []
    for step in range(8):
        images, targets = mix(IMAGES.clone(), LABELS, step)
        assert images.shape == IMAGES.shape
        assert targets.shape == (6, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        seen.append(images)
        again, same = build_mixing(AugmentConfig(), 5, seed=1)(IMAGES.clone(), LABELS, step)
        assert torch.equal(images, again)
        assert torch.equal(targets, same)
    assert len({tuple(images.flatten().tolist()) for images in seen}) == 8


def test_ranks_draw_differently():
    first, second = (build_mixing(AugmentConfig(), 5, seed=1, rank=rank) for rank in (0, 1))
    assert not torch.equal(
        first(IMAGES.clone(), LABELS, 0)[0], second(IMAGES.clone(), LABELS, 0)[0]
    )


def test_without_mixing_targets_are_smoothed():
    mix = build_mixing(
        AugmentConfig(mixup=0, cutmix=0, random_erase=0, label_smoothing=0.1), 5, seed=0
    )
    images, targets = mix(IMAGES.clone(), LABELS, 0)
    assert torch.equal(images, IMAGES)
    expected = torch.full((6, 5), 0.02)
    expected[range(6), LABELS] = 0.92
    torch.testing.assert_close(targets, expected)


def test_random_erasing_writes_noise_into_a_rectangle():
    black = torch.zeros(64, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    augment = AugmentConfig(mixup=0, cutmix=0, random_erase=0.25)
    images, _ = build_mixing(augment, 5, seed=0)(black.clone(), torch.zeros(64).long(), 7)
    erased = [image for image in images if image.any()]
    assert 6 <= len(erased) <= 28  # of 64, a quarter
    for image in erased:
        where = (image != 0).any(0)
        rows, columns = where.any(1).sum(), where.any(0).sum()
        assert where.sum() == rows * columns
        assert image[:, where].unique().numel() > rows * columns  # per pixel, as Swin's recipe
    again, _ = build_mixing(augment, 5, seed=0)(black.clone(), torch.zeros(64).long(), 7)
    assert torch.equal(images, again)


def test_odd_batch():
    mix = build_mixing(AugmentConfig(), 5, seed=0)
    with pytest.raises(ValueError, match=r"data\.batch_size=5 is odd"):
        mix(IMAGES[:5].clone(), LABELS[:5], 0)


def test_global_generators_are_undisturbed(generator_states):
    before = generator_states()
    build_mixing(AugmentConfig(), 5, seed=0)(IMAGES.clone(), LABELS, 0)
    assert generator_states() == before
    with pytest.raises(ZeroDivisionError), seeded(3):  # also after an exception
        torch.rand(1).item() / 0
    assert generator_states() == before
