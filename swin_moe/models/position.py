"""Relative positions within a window: offsets, their index, and bias tables of other sizes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_coords(
    window_size: int, pretrained_window_size: int = 0, device: torch.device | None = None
) -> Tensor:
    """Return the log-spaced offsets [(2w−1)², 2] of the CPB network, equation 4 of the V2 paper.

    Args:
        pretrained_window_size: offsets are divided by this − 1, so that the network gets the
            coordinates for which it was trained; 0 = ``window_size``.
    """
    reach = window_size - 1
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=device)
    # A 1×1 window has the single offset 0; the official code divides it by zero.
    divisor = (pretrained_window_size - 1) if pretrained_window_size > 0 else reach
    offsets = 8 * offsets / max(divisor, 1)
    offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).flatten(0, 1)


def relative_index(window_size: int, device: torch.device | None = None) -> Tensor:
    """Return the row of the offset table for each (query, key) pair: [N, N], N = window_size²."""
    axis = torch.arange(window_size, device=device)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # [2, N]
    offset = position[:, :, None] - position[:, None, :] + window_size - 1
    return offset[0] * (2 * window_size - 1) + offset[1]


def spread_bias_table(table: Tensor, window_size: int) -> Tensor:
    """Spread a bias per offset to pairs of positions: [(2w−1)², heads] → [heads, N, N].

    The result is ``table[relative_index]``, computed by sliding windows: along each axis the offset
    of query i and key j is i − j, so that the biases of one query are w neighbours in the table,
    reversed. Its gradient is a sum over windows, several times faster than a scatter by index, and
    its order is fixed.
    """
    w = window_size
    offsets = table.t().unflatten(1, (2 * w - 1, 2 * w - 1)).flip(1, 2)  # [heads, dy, dx]
    pairs = offsets.unfold(1, w, 1).unfold(2, w, 1).flip(1, 2)  # [heads, i_y, i_x, j_y, j_x]
    return pairs.flatten(3, 4).flatten(1, 2)


def resize_bias_table(table: Tensor, window_size: int) -> Tensor:
    """Resize V1's table [(2w₀−1)², heads] to [(2w−1)², heads], bicubically.

    As in the official loader, the table is resized as an image, for larger and smaller windows.
    """
    length, heads = table.shape
    old, new = math.isqrt(length), 2 * window_size - 1
    if old == new:
        return table
    image = table.float().t().reshape(1, heads, old, old)
    image = F.interpolate(image, (new, new), mode="bicubic", align_corners=False)
    return image.reshape(heads, new * new).t().to(table.dtype)


def resize_position_embedding(
    embedding: Tensor, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Resize an absolute position embedding [1, h₀·w₀, C] to [1, h·w, C], bicubically."""
    if old == new:
        return embedding
    image = embedding.float().unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, new, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)
