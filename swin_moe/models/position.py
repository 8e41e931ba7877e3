"""Relative positions within a window: offsets, their index, and how a bias table changes size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_coords(
    window_size: int, pretrained_window_size: int = 0, device: torch.device | None = None
) -> Tensor:
    """Log-spaced offsets [(2w−1)², 2] of the CPB network, equation 4 of the Swin V2 paper.

    Offsets are divided by (pretrained window − 1) where one is given, so that a network trained at
    that window is asked for the same coordinates at a larger one.
    """
    reach = window_size - 1
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=device)
    # A 1×1 window has the single offset 0; the official code divides it by zero.
    divisor = (pretrained_window_size - 1) if pretrained_window_size > 0 else reach
    offsets = 8 * offsets / max(divisor, 1)
    offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).flatten(0, 1)


def relative_index(window_size: int, device: torch.device | None = None) -> Tensor:
    """Row of the offset table for each (query, key) pair: [N, N], N = window_size²."""
    axis = torch.arange(window_size, device=device)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # [2, N]
    offset = position[:, :, None] - position[:, None, :] + window_size - 1
    return offset[0] * (2 * window_size - 1) + offset[1]


def spread_bias_table(table: Tensor, window_size: int) -> Tensor:
    """The bias of every pair of positions, from one per offset: [(2w−1)², heads] to [heads, N, N].

    It is ``table[relative_index]``, made of sliding windows: along each axis the offset of query i
    and key j is i − j, so the biases of one query are w neighbours in the table, reversed. The
    gradient is then a sum over windows, several times faster than one that scatters by index, and
    in a fixed order.
    """
    w = window_size
    offsets = table.t().unflatten(1, (2 * w - 1, 2 * w - 1)).flip(1, 2)  # [heads, dy, dx]
    pairs = offsets.unfold(1, w, 1).unfold(2, w, 1).flip(1, 2)  # [heads, i_y, i_x, j_y, j_x]
    return pairs.flatten(3, 4).flatten(1, 2)


def resize_bias_table(table: Tensor, window_size: int) -> Tensor:
    """V1's table [(2w₀−1)², heads] at another window, bicubically: [(2w−1)², heads].

    The official loader's rule: the table is taken as an image and stretched, whether the window
    grows or shrinks.
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
    """An absolute position embedding [1, h₀·w₀, C] for another grid, bicubically: [1, h·w, C]."""
    if old == new:
        return embedding
    image = embedding.float().unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, new, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)
