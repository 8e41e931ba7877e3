"""SimMIM: masked image modelling (https://arxiv.org/abs/2111.09886) around a Swin encoder."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .swin import SwinTransformer


class SimMIMOutput(NamedTuple):
    """What SimMIM returns; train on ``loss + aux_loss``.

    Attributes:
        loss: scalar, mean absolute error of the masked pixels.
        reconstruction: like the images.
        aux_loss: scalar, sum of the MoE layers' weighted balance losses; 0 in a dense encoder.
    """

    loss: Tensor
    reconstruction: Tensor
    aux_loss: Tensor


class SimMIM(nn.Module):
    """Hides patches of an image from the encoder and predicts their pixels by one linear layer.

    State-dict names are the official ones: ``encoder.*`` with ``encoder.mask_token`` [1, 1, C], and
    ``decoder.0.*``, a 1×1 convolution to in_chans·stride² channels, stride = patch_size·2^(S−1).

    Args:
        encoder: a model without classes; :meth:`init_weights` draws only what is added to it.
        norm_target_size: side in pixels of the neighbourhood whose mean and variance normalise the
            target (V2: 47); 0 = plain pixels (V1).

    Raises:
        ValueError: the encoder has classes, or the neighbourhood has no centre.
    """

    def __init__(self, encoder: SwinTransformer, norm_target_size: int = 47) -> None:
        super().__init__()
        config = encoder.config
        if config.num_classes:
            raise ValueError(f"SimMIM needs model.num_classes=0, not {config.num_classes}")
        if norm_target_size and norm_target_size % 2 == 0:
            raise ValueError(f"norm_target_size={norm_target_size} must be odd, or 0 for no norm")
        self.config = config
        self.norm_target_size = norm_target_size
        self.encoder = encoder
        # Of the encoder in the official files, and so in ours.
        mask_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.encoder.register_parameter("mask_token", mask_token)
        stride = config.patch_size << (len(config.depths) - 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, config.in_chans * stride**2, 1),
            nn.PixelShuffle(stride),
        )
        self._init_own_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter and buffer anew, by the official rules."""
        self.encoder.init_weights()
        self._init_own_weights()

    def _init_own_weights(self) -> None:
        nn.init.trunc_normal_(self.encoder.get_parameter("mask_token"), std=0.02)
        self.decoder[0].reset_parameters()  # type: ignore[operator]

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

    def forward(self, images: Tensor, mask: Tensor) -> SimMIMOutput:
        """Images [B, in_chans, H, W] and mask [B, H/p, W/p], 1 = masked."""
        height, width = images.shape[-2:]
        tokens = self.encoder.add_position(self.embed(images, mask))
        features, routed = self.encoder.forward_stages(tokens)
        reconstruction = self.decoder(features.permute(0, 3, 1, 2))[..., :height, :width]
        target = images.to(_wide(images))
        if self.norm_target_size:
            target = norm_target(target, self.norm_target_size)
        p = self.config.patch_size
        pixels = mask.bool().repeat_interleave(p, 1).repeat_interleave(p, 2)
        pixels = pixels[:, None, :height, :width].to(target.dtype)
        error = ((target - reconstruction).abs() * pixels).sum()
        loss = error / (pixels.sum() + 1e-5) / images.shape[1]
        aux_loss = torch.stack([r.aux_loss for r in routed]).sum() if routed else loss.new_zeros(())
        return SimMIMOutput(loss, reconstruction, aux_loss)


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
