"""Shifted-window attention from qkv to output: the PyTorch reference.

Formulas: Swin Transformer V2 (https://arxiv.org/abs/2111.09883), section 3.2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

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
    pad_h, pad_w = -H % window_size, -W % window_size
    if pad_h or pad_w:
        qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, pad_w, 0, pad_h))
    if shift_size:
        qkv = torch.roll(qkv, (-shift_size, -shift_size), (1, 2))
    Hp, Wp = H + pad_h, W + pad_w
    rows, cols = Hp // window_size, Wp // window_size
    windows = qkv.view(B, rows, window_size, cols, window_size, 3, heads, head_dim)
    # [3, B, nW, heads, N, head_dim]
    windows = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, rows * cols, heads, N, head_dim)
    q, k, v = windows.unbind(0)
    compute = torch.promote_types(qkv.dtype, torch.float32)
    factor = scale.to(compute)
    if cosine:
        factor = factor.clamp(max=MAX_LOG_SCALE).exp()
        q, k = _unit(q), _unit(k)
    logits = (q @ k.transpose(-2, -1)).to(compute) * factor + bias.to(compute)
    if shift_size or pad_h or pad_w:
        mask = _region_mask(H, W, window_size, shift_size, str(qkv.device))
        logits = logits + mask.to(compute)[:, None]  # [nW, 1, N, N]
    probabilities = F.dropout(logits.softmax(-1), dropout_p, training=dropout_p > 0)
    out = probabilities.to(v.dtype) @ v  # [B, nW, heads, N, head_dim]
    out = out.view(B, rows, cols, heads, window_size, window_size, head_dim)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, Hp, Wp, heads * head_dim)
    if shift_size:
        out = torch.roll(out, (shift_size, shift_size), (1, 2))
    return out[:, :H, :W] if pad_h or pad_w else out


def _unit(x: Tensor) -> Tensor:
    """Rows of length one; the norm is taken in at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(x.dtype)


def _region_ids(length: int, padded: int, window_size: int, shift_size: int) -> Tensor:
    """Region of each position of the shifted axis: 0 to 2 as in the paper, −1 for padding."""
    ids = torch.zeros(padded, dtype=torch.long)
    if shift_size:
        ids[-window_size:-shift_size] = 1
        ids[-shift_size:] = 2
    positions = (torch.arange(padded) + shift_size) % padded
    return torch.where(positions < length, ids, -1)


@lru_cache(maxsize=64)
def _region_mask(H: int, W: int, window_size: int, shift_size: int, device: str) -> Tensor:
    """[nW, N, N]: 0 within a region, −100 across regions, −inf towards padded keys."""
    with torch.inference_mode(False), torch.no_grad():
        pad_h, pad_w = -H % window_size, -W % window_size
        row = _region_ids(H, H + pad_h, window_size, shift_size)
        col = _region_ids(W, W + pad_w, window_size, shift_size)
        region = torch.where((row[:, None] < 0) | (col < 0), -1, row[:, None] * 3 + col)
        w = window_size
        region = region.view((H + pad_h) // w, w, (W + pad_w) // w, w)
        region = region.transpose(1, 2).reshape(-1, w * w)
        different = region[:, None, :] != region[:, :, None]
        mask = torch.zeros(different.shape).masked_fill(different, MASK_VALUE)
        mask = mask.masked_fill((region < 0)[:, None, :], float("-inf"))
        return mask.to(device)


_library.declare_reference("window_attention")
