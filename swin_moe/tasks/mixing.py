"""Random erasing, mixup and CutMix through timm, with randomness that needs no state to resume."""

from __future__ import annotations

from collections.abc import Callable

from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ..config import AugmentConfig
from ..data.rng import seeded

Mixing = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def build_mixing(augment: AugmentConfig, num_classes: int, seed: int, rank: int = 0) -> Mixing:
    """A function ``(images [B, C, H, W], labels [B], step) -> (images, targets [B, num_classes])``.

    Images are float and normalised; they are erased and mixed in place, on their own device.
    Targets are soft, with label smoothing, also where mixup and CutMix are off. What is drawn is a
    function of ``(seed, rank, step)`` alone, but for the noise of an erased rectangle on a GPU,
    which is its own generator's.

    Raises:
        ValueError: by the returned function, if images are mixed and their number is odd (images
            are mixed in pairs).
    """
    smoothing = augment.label_smoothing
    mixed = augment.mixup > 0 or augment.cutmix > 0
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )

    def mix(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if mixed and len(images) % 2:
            raise ValueError(
                f"data.batch_size={len(images)} is odd, but mixup and cutmix need pairs: make it "
                "even or set augment.mixup=0 augment.cutmix=0"
            )
        with seeded(seed, rank, step):
            if augment.random_erase:
                RandomErasing(augment.random_erase, mode="pixel", device=images.device)(images)
            if not mixed:
                return images, mixup_target(labels, num_classes, smoothing=smoothing)
            return mixup(images, labels)

    return mix
