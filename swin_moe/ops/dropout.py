"""Dropout as a function of a seed and an element's place: nothing is saved for the backward pass.

All devices' kernels compute the same mask (``csrc/cpu/simd_math.h``, ``csrc/cuda/dropout.cuh``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed [1] int64 from torch's default generator of a device."""
    return torch.randint(2**63 - 1, (1,), device=device)


def keep_mask(seed: Tensor, row: Tensor, columns: int, dropout_p: float) -> Tensor:
    """Return 0 or 1 / (1 − p) per element [rows, columns]: a hash of row, column and seed.

    The hash is 32-bit "lowbias32" (https://nullprogram.com/blog/2018/07/31/), here in int64.

    Args:
        seed: [1] int64.
        row: [rows] int64, numbers of the rows.
    """
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    key = _mix(_mix((row & 0xFFFFFFFF) ^ low) ^ (row >> 32) ^ high)
    column = torch.arange(columns, device=seed.device) * _GOLDEN
    hashed = _mix((key[:, None] + column) & 0xFFFFFFFF)
    kept = hashed >= min(int(dropout_p * 2**32), 2**32 - 1)
    return kept * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
