"""SimMIM: masked image modelling (https://arxiv.org/abs/2111.09886) around a Swin encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .outputs import Outputs
from .swin import SwinTransformer


class SimMIM(nn.Module):
    """An encoder that sees an image without its masked patches, and a layer that predicts pixels.

    State-dict names are the official ones: ``encoder.*`` with ``encoder.mask_token`` [1, 1, C], and
    ``decoder.0.*``, a 1×1 convolution to in_chans·stride² channels, stride = patch_size·2^(S−1).

    Args:
        encoder: a model without classes, which gets a mask token.
        initialise: draw the weights of mask token and decoder; otherwise the caller calls
            :meth:`init_weights`.

    Raises:
        ValueError: the encoder has classes.
    """

    def __init__(self, encoder: SwinTransformer, *, initialise: bool = True) -> None:
        super().__init__()
        config = encoder.config
        if config.num_classes:
            raise ValueError(f"SimMIM needs model.num_classes=0, not {config.num_classes}")
        self.config = config
        self.encoder = encoder
        encoder.add_mask_token()
        stride = config.patch_size << (len(config.depths) - 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, config.in_chans * stride**2, 1),
            nn.PixelShuffle(stride),
        )
        if initialise:
            nn.init.trunc_normal_(encoder.get_parameter("mask_token"), std=0.02)

    @torch.no_grad()
    def init_weights(
        self, made: Callable[[nn.Module], AbstractContextManager[None]] = lambda _: nullcontext()
    ) -> None:
        """Set every parameter and buffer again, by the official rules.

        Args:
            made: entered with each module while its own parameters are set, once.
        """
        self.encoder.init_weights(made)
        for module in self.decoder:
            with made(module):
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()

    def embed(self, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B, H/p, W/p, C] before the position embedding, masked ones replaced.

        Raises:
            ValueError: the mask has another shape.
        """
        tokens = self.encoder.patch_embed(images)
        if mask.shape != tokens.shape[:3]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(tokens.shape[:3])}: "
                "one value per patch"
            )
        token = self.encoder.get_parameter("mask_token").to(tokens.dtype)
        return torch.where(mask.bool()[..., None], token, tokens)

    def forward(self, images: Tensor, mask: Tensor) -> Outputs:
        """Reconstruct images [B, in_chans, H, W] from those patches that are not masked.

        Args:
            mask: [B, H/p, W/p], 1 or True = masked.
        """
        height, width = images.shape[-2:]
        tokens = self.encoder.add_position(self.embed(images, mask))
        features, results = self.encoder.forward_stages(tokens)
        reconstruction = self.decoder(features.permute(0, 3, 1, 2))[..., :height, :width]
        return Outputs.of(reconstruction, results)


def masked_pixels(mask: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """A mask of patches [B, H/p, W/p] as a mask of pixels [B, 1, height, width] bool."""
    pixels = mask.bool().repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return pixels[:, None, :height, :width]


def absolute_error(
    reconstruction: Tensor, images: Tensor, mask: Tensor, patch_size: int, norm_target_size: int
) -> tuple[Tensor, Tensor]:
    """Compare the masked pixels with their targets.

    Args:
        reconstruction, images: [B, C, H, W].
        mask: [B, H/p, W/p], 1 or True = masked.
        norm_target_size: side in pixels of the neighbourhood whose mean and variance normalise the
            target (V2: 47); 0 = plain pixels (V1).

    Returns:
        the absolute errors [B, C, H, W], 0 outside the mask; and the mask [B, 1, H, W] as numbers.
    """
    target = images.to(_wide(images))
    if norm_target_size:
        target = norm_target(target, norm_target_size)
    pixels = masked_pixels(mask, patch_size, *images.shape[-2:]).to(target.dtype)
    return (target - reconstruction).abs() * pixels, pixels


def masked_l1_loss(error: Tensor, pixels: Tensor) -> Tensor:
    """The official loss of :func:`absolute_error`: mean over masked pixels and channels."""
    return error.sum() / (pixels.sum() + 1e-5) / error.shape[1]


def norm_target(images: Tensor, size: int = 47) -> Tensor:
    """Pixels [B, C, H, W] less the mean, over the deviation, of the size × size around each.

    Only pixels inside the image count; the variance is the unbiased one.
    """
    images = images.to(_wide(images))  # the variance is a small difference of large numbers
    mean, mean_square = _box_mean(images, size), _box_mean(images.square(), size)
    rows, cols = (_neighbours(side, size, images.device) for side in images.shape[-2:])
    count = rows[:, None] * cols
    variance = (mean_square - mean.square()) * (count / (count - 1).clamp(min=1))
    return (images - mean) / (variance.clamp(min=0) + 1e-6).sqrt()


def _box_mean(x: Tensor, size: int) -> Tensor:
    """Mean over the size × size around each pixel, first along columns, then along rows."""
    for kernel in ((size, 1), (1, size)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        x = F.avg_pool2d(x, kernel, stride=1, padding=padding, count_include_pad=False)
    return x


def _neighbours(length: int, size: int, device: torch.device) -> Tensor:
    """How many of the ``size`` places around each position lie on the axis: [length]."""
    position = torch.arange(length, device=device)
    last = (position + size // 2).clamp(max=length - 1)
    return last - (position - size // 2).clamp(min=0) + 1


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def random_mask(
    height: int,
    width: int,
    *,
    patch_size: int,
    mask_unit: int = 32,
    ratio: float = 0.6,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A mask of one image in patches: [height/p, width/p] bool, True = masked.

    Of the squares of ``mask_unit`` pixels, ⌈ratio·number⌉ are masked as a whole. ``height`` and
    ``width`` are in pixels.

    Raises:
        ValueError: a side is no multiple of the unit, the unit none of the patch, or the ratio not
            in [0, 1].
    """
    if height % mask_unit or width % mask_unit or mask_unit % patch_size:
        raise ValueError(
            f"mask_unit={mask_unit} must divide the image's {height} × {width} pixels and be a "
            f"multiple of patch_size={patch_size}"
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} must be in [0, 1]")
    rows, cols = height // mask_unit, width // mask_unit
    chosen = torch.randperm(rows * cols, generator=generator)[: math.ceil(ratio * rows * cols)]
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[chosen] = True
    scale = mask_unit // patch_size
    return mask.view(rows, cols).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
