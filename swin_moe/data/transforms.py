"""Image transforms for training and evaluation, made by timm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from ..config import AugmentConfig

Transform = Callable[[Image.Image], Tensor]

MODES = {1: "L", 3: "RGB"}


def image_mode(in_chans: int) -> str:
    """Pillow's name for images of ``in_chans`` channels.

    Raises:
        ValueError: neither 1 (grey) nor 3 (colour).
    """
    if in_chans not in MODES:
        raise ValueError(
            f"model.in_chans={in_chans} cannot be read from image files: use 1 (grey) or 3 (RGB)"
        )
    return MODES[in_chans]


def build_transform(
    augment: AugmentConfig,
    image_sides: tuple[int, int],
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    training: bool,
) -> Transform:
    """The transform from an image of mode :func:`image_mode` to ``[in_chans, height, width]``.

    Every operation of timm's and torchvision's policies works on grey images as well, so that
    nothing is converted back and forth; those of colour then change nothing. As in timm (and the
    Swin recipes), colour jitter applies only where there is no automatic augmentation, save 3a.

    Args:
        image_sides: (height, width) in pixels.
        mean, std: per channel, of pixels in [0, 1].
        training: augment; otherwise resize the shorter side to its size / ``eval_crop`` (rounded
            down, bicubic) and crop the centre.

    Raises:
        ValueError: ``augment.auto_augment`` is not a policy that timm knows.
    """
    image_mode(in_chans)
    normalise: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std)}
    if not training:
        return create_transform(
            image_sides, crop_pct=augment.eval_crop, interpolation="bicubic", **normalise
        )
    try:
        return create_transform(
            image_sides,
            is_training=True,
            scale=(augment.scale[0], augment.scale[1]),
            ratio=(augment.ratio[0], augment.ratio[1]),
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment or None,
            interpolation=augment.interpolation,
            re_prob=augment.random_erase,
            re_mode="pixel",
            **normalise,
        )
    except (AssertionError, KeyError, ValueError):  # what timm raises on a string it cannot read
        raise ValueError(
            f"augment.auto_augment={augment.auto_augment!r} is not a policy of timm: use for "
            "example 'rand-m9-mstd0.5-inc1', 'original', '3a', or '' for none"
        ) from None
