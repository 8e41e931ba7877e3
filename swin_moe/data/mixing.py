"""Mixup and CutMix through timm, with randomness that needs no state to resume."""

from __future__ import annotations

from collections.abc import Callable

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from ..config import AugmentConfig
from .rng import seeded

Mixing = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def build_mixing(augment: AugmentConfig, num_classes: int, seed: int, rank: int = 0) -> Mixing:
    """A function ``(images [B, C, H, W], labels [B], step) -> (images, targets [B, num_classes])``.

    Targets are soft, with label smoothing, also where mixup and CutMix are off. What is drawn is a
    function of ``(seed, rank, step)`` alone. The images are mixed in place, on their own device.

    Raises:
        ValueError: by the returned function, if images are mixed and their number is odd (images
            are mixed in pairs).
    """
    smoothing = augment.label_smoothing
    if augment.mixup == 0 and augment.cutmix == 0:
        return lambda images, labels, step: (
            images,
            mixup_target(labels, num_classes, smoothing=smoothing),
        )
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )

    def mix(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if len(images) % 2:
            raise ValueError(
                f"data.batch_size={len(images)} is odd, but mixup and cutmix need pairs: make it "
                "even or set augment.mixup=0 augment.cutmix=0"
            )
        with seeded(seed, rank, step):
            return mixup(images, labels)

    return mix
