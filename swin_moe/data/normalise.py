"""Normalisation of pixels from bytes to float32, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalise:
    """(pixel / 255 − mean) / std, per channel.

    Args:
        mean: [C], of pixels in [0, 1].
        std: [C], of pixels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        scale = torch.tensor(std, dtype=torch.float64)
        self._factor = (1 / (255 * scale)).float()
        self._shift = (-torch.tensor(mean, dtype=torch.float64) / scale).float()

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images [B, C, H, W] uint8 to float32, both channels-last in memory."""
        rows = images.permute(0, 2, 3, 1).flatten(2)  # [B, H, W·C]
        width = images.shape[3]
        # Along whole rows: on a CPU, PyTorch's broadcast over three channels is four times slower.
        factor = self._factor.to(images.device).repeat(width)
        shift = self._shift.to(images.device).repeat(width)
        pixels = rows.float().mul_(factor).add_(shift)
        return pixels.unflatten(2, (width, -1)).permute(0, 3, 1, 2)
