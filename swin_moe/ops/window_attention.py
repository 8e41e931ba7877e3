"""Shifted-window attention from qkv to output: the PyTorch reference.

Formulas: Swin Transformer V2 (https://arxiv.org/abs/2111.09883), section 3.2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from swin_moe.ops import _library

MASK_VALUE = -100.0  # additive, as the family has it: V2's logits may exceed 100, then keys leak
MAX_LOG_SCALE = math.log(100.0)


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    window_size: int,
    shift_size: int = 0,
    cosine: bool = True,
    dropout_p: float = 0.0,
) -> Tensor:
    """Multi-head attention within (shifted) windows of a feature map.

    Sides that the window does not divide are padded inside; padded keys never take part.

    Args:
        qkv: [B, H, W, 3, heads, head_dim].
        bias: [heads, N, N] position bias, N = window_size².
        scale: [heads, 1, 1]; with ``cosine`` the *log* of the logit scale, clamped at ln 100,
            else the factor itself.
        window_size: side of a window in tokens.
        shift_size: cyclic shift; regions that are not neighbours in the image get −100.
        cosine: cosine attention (V2) instead of the scaled dot product (V1).
        dropout_p: dropout on the probabilities.

    Returns:
        [B, H, W, heads·head_dim] in the dtype of ``qkv``.
    """
    B, H, W, three, heads, head_dim = qkv.shape
    if three != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: dimension 3 must be 3 (q, k, v)")
    N = window_size * window_size
    if bias.shape != (heads, N, N):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(heads, N, N)}")
    rows, cols = -(-H // window_size), -(-W // window_size)
    Hp, Wp = rows * window_size, cols * window_size
    # Of a size that is dynamic in a compiled graph nothing is known: it is padded, perhaps by zero.
    padded = not (statically_known_true(Hp == H) and statically_known_true(Wp == W))
    if padded:
        qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, Wp - W, 0, Hp - H))
    if shift_size:
        qkv = torch.roll(qkv, (-shift_size, -shift_size), (1, 2))
    q, k, v = _partition(qkv, rows, cols).unbind(0)
    compute = torch.promote_types(qkv.dtype, torch.float32)
    factor = scale.to(compute)
    if cosine:
        factor = factor.clamp(max=MAX_LOG_SCALE).exp()
        q, k = _unit(q), _unit(k)
    logits = (q @ k.transpose(-2, -1)).to(compute) * factor + bias.to(compute)
    if shift_size or padded:
        # A compiled or exported graph computes its mask: it must hold for other sizes, too.
        region_mask = _region_mask if torch.compiler.is_compiling() else _cached_region_mask
        mask = region_mask(H, W, window_size, shift_size, qkv.device)
        logits = logits + mask.to(compute)[:, None]  # [nW, 1, N, N]
    probabilities = F.dropout(logits.softmax(-1), dropout_p, training=dropout_p > 0)
    out = probabilities.to(v.dtype) @ v  # [B, nW, heads, N, head_dim]
    out = out.view(B, rows, cols, heads, window_size, window_size, head_dim)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, Hp, Wp, heads * head_dim)
    if shift_size:
        out = torch.roll(out, (shift_size, shift_size), (1, 2))
    if not padded:
        return out
    # What follows copies a slice anyway; a copy here, and no graph asks whether it is contiguous.
    return out[:, :H, :W].clone(memory_format=torch.contiguous_format)


def _partition(qkv: Tensor, rows: int, cols: int) -> Tensor:
    """[B, rows·w, cols·w, 3, heads, head_dim] to windows [3, B, rows·cols, heads, w², head_dim]."""
    windows = qkv.unflatten(2, (cols, -1)).unflatten(1, (rows, -1))
    # [B, rows, w, cols, w, 3, heads, head_dim]
    windows = windows.permute(5, 0, 1, 3, 6, 2, 4, 7)
    return windows.flatten(5, 6).flatten(2, 3)


def _unit(x: Tensor) -> Tensor:
    """Rows of length one; the norm is taken in at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(x.dtype)


def _region_ids(length: int, window_size: int, shift_size: int, device: torch.device) -> Tensor:
    """Region of each position of the shifted axis: 0 to 2 as in the paper, −1 for padding.

    [⌈length / window_size⌉, window_size]
    """
    windows = -(-length // window_size)
    padded = windows * window_size
    shifted = torch.arange(padded, device=device)
    ids = torch.zeros_like(shifted)
    if shift_size:
        ids = (shifted >= padded - window_size).long() + (shifted >= padded - shift_size).long()
    original = (shifted + shift_size) % padded
    return torch.where(original < length, ids, -1).view(windows, window_size)


def _region_mask(H: int, W: int, window_size: int, shift_size: int, device: torch.device) -> Tensor:
    """[nW, N, N]: 0 within a region, −100 across regions, −inf towards padded keys."""
    row = _region_ids(H, window_size, shift_size, device)[:, None, :, None]
    col = _region_ids(W, window_size, shift_size, device)[None, :, None, :]
    region = torch.where((row < 0) | (col < 0), -1, row * 3 + col)  # [rows, cols, w, w]
    region = region.flatten(2).flatten(0, 1)
    different = region[:, None, :] != region[:, :, None]
    mask = torch.where(different, MASK_VALUE, 0.0)
    return mask.masked_fill((region < 0)[:, None, :], float("-inf"))


@lru_cache(maxsize=64)
def _cached_region_mask(
    H: int, W: int, window_size: int, shift_size: int, device: torch.device
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _region_mask(H, W, window_size, shift_size, device)


_library.declare_reference("window_attention")
