"""Image transforms for training and evaluation: timm's policies on pixels decoded for the crop."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.transforms_factory import create_transform

from ..config import AugmentConfig
from .decode import MAX_PIXELS, EncodedImage, to_image

Transform = Callable[[bytes], np.ndarray]
"""From an encoded image to pixels [height, width, channels] uint8."""

MODES = {1: "L", 3: "RGB"}


def image_mode(in_chans: int) -> str:
    """Return Pillow's name for images of ``in_chans`` channels.

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
    training: bool,
    max_pixels: int = MAX_PIXELS,
) -> Transform:
    """Build the transform from encoded images to pixels.

    Every operation of timm's and torchvision's policies also works on grey images, where those of
    colour change nothing. As in timm (and the Swin recipes), colour jitter applies only without
    automatic augmentation or with ``3a``.

    Args:
        image_sides: (height, width) in pixels.
        mean: per channel, of pixels in [0, 1]; rotations and shears fill with it.
        max_pixels: of an image, see ``data.max_pixels``.
        training: augment; otherwise resize the shorter side to its size / ``eval_crop`` (rounded
            down, bicubic) and crop the centre.

    Raises:
        ValueError: ``augment.auto_augment`` is not a policy that timm knows.
    """
    mode = image_mode(in_chans)
    if training:
        return TrainTransform(augment, image_sides, mode, mean, max_pixels)
    return EvalTransform(augment.eval_crop, image_sides, mode, max_pixels)


class TrainTransform:
    """timm's random crop, resize, flip and automatic augmentation.

    Crop, flip and policy are timm's. Two things differ: PyTorch's vectorised kernel resizes the
    crop, within one level of Pillow's result, and a crop of twice the final size or more is taken
    from a JPEG decoded at a half (quarter, eighth) of its size.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        sides: tuple[int, int],
        mode: str,
        mean: Sequence[float],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.sides, self.mode, self._max_pixels = sides, mode, max_pixels
        try:
            _check_policy(augment.auto_augment)
            first, second, _ = create_transform(
                sides,
                is_training=True,
                separate=True,
                scale=(augment.scale[0], augment.scale[1]),
                ratio=(augment.ratio[0], augment.ratio[1]),
                hflip=augment.hflip,
                color_jitter=augment.color_jitter,
                auto_augment=augment.auto_augment or None,
                interpolation=augment.interpolation,
                mean=tuple(mean),
            )
        except (AssertionError, KeyError, ValueError):  # timm's, on an unknown policy
            raise ValueError(
                f"augment.auto_augment={augment.auto_augment!r} is not a policy of timm: use for "
                "example 'rand-m9-mstd0.5-inc1', 'original', '3a', or '' for none"
            ) from None
        self._crop = first.transforms[0]
        self._augment: list[Callable[[Any], Any]] = [*first.transforms[1:], *second.transforms]

    def __call__(self, data: bytes) -> np.ndarray:
        encoded = EncodedImage(data, self.mode, self._max_pixels)
        height, width = encoded.height, encoded.width
        shape_only = torch.empty(1, height, width, device="meta")
        box = self._crop.get_params(shape_only, self._crop.scale, self._crop.ratio)
        needed = (
            math.ceil(height * self.sides[0] / box[2]),
            math.ceil(width * self.sides[1] / box[3]),
        )
        pixels = cut(encoded.pixels(needed), box, (height, width))
        modes = self._crop.interpolation
        interpolation = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        image = to_image(resize(pixels, self.sides, interpolation.value))
        for operation in self._augment:
            image = operation(image)
        return _pixels(image)


def _check_policy(policy: str) -> None:
    """Raise ``ValueError`` for a part without a number, such as ``mX``, which timm ignores."""
    name, *parts = policy.split("-")
    for part in parts:
        if not re.match(r"[a-z]+\d", part) and not (name == "rand" and part.startswith("t")):
            raise ValueError(part)


class EvalTransform:
    """timm's resize and centre crop, pixel-exact with Pillow."""

    def __init__(
        self, eval_crop: float, sides: tuple[int, int], mode: str, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.mode, self._max_pixels = mode, max_pixels
        # The last step would make a tensor.
        self._steps = create_transform(
            sides, crop_pct=eval_crop, interpolation="bicubic", use_prefetcher=True
        ).transforms[:-1]

    def __call__(self, data: bytes) -> np.ndarray:
        image = EncodedImage(data, self.mode, self._max_pixels).image()
        for step in self._steps:
            image = step(image)
        return _pixels(image)


def cut(
    pixels: np.ndarray, box: tuple[int, int, int, int], original: tuple[int, int]
) -> np.ndarray:
    """Return a view of the box (top, left, height, width) of an image.

    Args:
        pixels: [H, W, C], of the image or of a reduced copy.
        box: in pixels of the original.
        original: (height, width).
    """
    scale = pixels.shape[0] / original[0], pixels.shape[1] / original[1]
    top, left = round(box[0] * scale[0]), round(box[1] * scale[1])
    bottom = max(round((box[0] + box[2]) * scale[0]), top + 1)
    right = max(round((box[1] + box[3]) * scale[1]), left + 1)
    return pixels[top:bottom, left:right]


def resize(pixels: np.ndarray, sides: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize [H, W, C] uint8 with antialiasing, as Pillow does (within one level), but faster.

    Args:
        interpolation: ``bicubic`` or ``bilinear``.
    """
    if pixels.shape[:2] == sides:
        return np.ascontiguousarray(pixels)
    # PyTorch keeps channels-last memory only if the rows are contiguous.
    images = torch.from_numpy(np.array(pixels, order="C"))[None].permute(0, 3, 1, 2)
    resized = F.interpolate(images, sides, mode=interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


def _pixels(image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)
