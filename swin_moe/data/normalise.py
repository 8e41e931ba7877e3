"""Normalisation of pixels from bytes to float32, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


class Normalise:
    """(pixel / 255 − mean) / std, per channel.

    Args:
        mean: [C], of pixels in [0, 1].
        std: [C], of pixels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = tuple(mean), tuple(std)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images [B, C, H, W] uint8 to float32, both channels-last in memory."""
        rows = images.permute(0, 2, 3, 1).flatten(2)  # [B, H, W·C]
        width = images.shape[3]
        factor, shift = _along_a_row(self._mean, self._std, width, images.device)
        pixels = rows.float().mul_(factor).add_(shift)
        return pixels.unflatten(2, (width, -1)).permute(0, 3, 1, 2)


# Not an attribute: a task goes to the loader's worker processes, and tensors on a GPU must not.
@cache
def _along_a_row(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return factor and shift of each value of a row, [width · C]; copied to a device only once.

    Whole rows, since on a CPU PyTorch's broadcast over three channels is four times slower.
    """
    scale = torch.tensor(std, dtype=torch.float64)
    factor = (1 / (255 * scale)).float()
    shift = (-torch.tensor(mean, dtype=torch.float64) / scale).float()
    return factor.repeat(width).to(device), shift.repeat(width).to(device)
