"""Swin V2 attention: cosine similarity and a log-spaced continuous position bias (CPB)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import window_attention
from .layers import Fp32Linear, QKVLinear

CPB_HIDDEN = 512


def relative_coords(window_size: int, pretrained_window_size: int = 0) -> Tensor:
    """Log-spaced offsets [(2w−1)², 2] of the CPB network, equation 4 of the Swin V2 paper.

    Offsets are divided by (pretrained window − 1) where one is given, so that a network trained at
    that window is asked for the same coordinates at a larger one.
    """
    reach = window_size - 1
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    # A 1×1 window has the single offset 0; the official code divides it by zero.
    divisor = (pretrained_window_size - 1) if pretrained_window_size > 0 else reach
    offsets = 8 * offsets / max(divisor, 1)
    offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).flatten(0, 1)


def relative_index(window_size: int) -> Tensor:
    """Row of the offset table for each (query, key) pair: [N, N], N = window_size²."""
    axis = torch.arange(window_size)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # [2, N]
    offset = position[:, :, None] - position[:, None, :] + window_size - 1
    return offset[0] * (2 * window_size - 1) + offset[1]


class WindowAttention(nn.Module):
    """Attention of one block; state-dict names are the official ones.

    Args:
        dim: width C; ``num_heads`` divides it.
        window_size: side of the window at the built resolution.
        pretrained_window_size: window the weights were trained at; 0 = this one.
    """

    coords: Tensor
    index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        pretrained_window_size: int = 0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.pretrained_window_size = pretrained_window_size
        self.attn_drop = attn_drop
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            Fp32Linear(2, CPB_HIDDEN), nn.ReLU(), Fp32Linear(CPB_HIDDEN, num_heads, bias=False)
        )
        self.qkv = QKVLinear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        coords = relative_coords(window_size, pretrained_window_size)
        self.register_buffer("coords", coords, persistent=False)
        self.register_buffer("index", relative_index(window_size), persistent=False)

    def position_bias(self, window_size: int) -> Tensor:
        """16·sigmoid of the CPB network at each pair of positions: [heads, N, N] in fp32."""
        coords, index = self.coords, self.index
        if window_size != self.window_size:  # another resolution than the one built for
            coords = relative_coords(window_size, self.pretrained_window_size).to(coords)
            index = relative_index(window_size).to(index)
        table = self.cpb_mlp(coords)  # [(2w−1)², heads]
        return 16 * table[index].permute(2, 0, 1).sigmoid()

    def forward(self, x: Tensor, window_size: int, shift_size: int) -> Tensor:
        """x [B, H, W, C] to [B, H, W, C]; window and shift are the block's for this resolution."""
        B, H, W, C = x.shape
        bias = None
        if (
            self.q_bias is not None and self.v_bias is not None
        ):  # a bias of k would change nothing under softmax: zero
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(x, bias)
        out = window_attention(
            qkv.view(B, H, W, 3, self.num_heads, C // self.num_heads),
            self.position_bias(window_size),
            self.logit_scale,
            window_size=window_size,
            shift_size=shift_size,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out))
