"""Peers that compute shifted-window attention, all from the same qkv map to the same output map.

Every peer is written as its users would write it at best: roll and partition, then attention with
the bias and the additive mask, then merging and rolling back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import window_partition, window_reverse
from torch import Tensor
from torch.nn.attention import flex_attention as flex

COMPILED_FLEX = torch.compile(flex.flex_attention)


class Inputs(NamedTuple):
    """Inputs of a call: qkv [B, H, W, 3, heads, d], bias [heads, N, N], scale [heads, 1, 1]."""

    qkv: Tensor
    bias: Tensor
    scale: Tensor
    mask: Tensor | None  # [nW, N, N], built beforehand, as timm does
    window_size: int
    shift_size: int


def windows(inputs: Inputs) -> Tensor:
    """Return [3, B·nW, heads, N, d], rolled and partitioned by timm's function."""
    qkv, w, s = inputs.qkv, inputs.window_size, inputs.shift_size
    B, H, W, _, heads, d = qkv.shape
    if s:
        qkv = torch.roll(qkv, (-s, -s), (1, 2))
    parts = window_partition(qkv.reshape(B, H, W, -1), (w, w))
    return parts.view(-1, w * w, 3, heads, d).permute(2, 0, 3, 1, 4)


def merged(inputs: Inputs, out: Tensor) -> Tensor:
    """Return [B·nW, heads, N, d] as a map [B, H, W, heads·d]."""
    w, s = inputs.window_size, inputs.shift_size
    out = out.transpose(1, 2).reshape(-1, w, w, out.shape[1] * out.shape[3])
    out = window_reverse(out, (w, w), (inputs.qkv.shape[1], inputs.qkv.shape[2]))
    return torch.roll(out, (s, s), (1, 2)) if s else out


def timm_attention(inputs: Inputs) -> Tensor:
    """Compute as timm's ``WindowAttention`` between its qkv and its proj layer."""
    q, k, v = windows(inputs).unbind(0)
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    factor = torch.clamp(inputs.scale, max=math.log(100.0)).exp().to(q.dtype)
    attn = attn * factor + inputs.bias.to(q.dtype)
    if inputs.mask is not None:
        n, heads = attn.shape[-1], attn.shape[1]
        attn = attn.view(-1, len(inputs.mask), heads, n, n) + inputs.mask[:, None].to(q.dtype)
        attn = attn.view(-1, heads, n, n)
    return merged(inputs, attn.softmax(-1) @ v)


def _unit(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = windows(inputs).unbind(0)
    factor = torch.clamp(inputs.scale, max=math.log(100.0)).exp().to(q.dtype)
    return F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), v


def sdpa_attention(inputs: Inputs) -> Tensor:
    """Call ``scaled_dot_product_attention`` with bias and mask as one additive mask per window."""
    q, k, v = _unit(inputs)
    heads, n, d = q.shape[1:]
    bias = inputs.bias.to(q.dtype)[None]
    if inputs.mask is not None:
        bias = bias + inputs.mask[:, None].to(q.dtype)  # [nW, heads, N, N]
        folded = (-1, len(inputs.mask) * heads, n, d)
        q, k, v = (x.reshape(folded) for x in (q, k, v))
        bias = bias.reshape(1, -1, n, n)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return merged(inputs, out.reshape(-1, heads, n, d))


def flex_attention(inputs: Inputs) -> Tensor:
    """Call torch's compiled ``flex_attention``, with a score function for bias and mask.

    Compiled by itself: as one graph with what is around it, it gave wrong numbers on a CPU.
    """
    q, k, v = _unit(inputs)
    bias, mask = inputs.bias, inputs.mask
    if mask is None:

        def score(value, b, h, i, j):
            return value + bias[h, i, j]

    else:
        count = len(mask)

        def score(value, b, h, i, j):
            return value + bias[h, i, j] + mask[b % count, i, j]

    return merged(inputs, COMPILED_FLEX(q, k, v, score_mod=score, scale=1.0))
