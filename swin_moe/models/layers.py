"""Patch embedding, patch merging and the dense feed-forward of the Swin family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.wide import exact_linear
from ..ops import fixed, sides


class Fp32Linear(nn.Linear):
    """A Linear layer in full fp32 (fp64 for fp64 weights), also under autocast and with TF32."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(input.device.type, enabled=False):
            return exact_linear(input.to(wide), self.weight.to(wide), bias)


class PatchEmbed(nn.Module):
    """Patch embedding: images [B, C, H, W] become tokens [B, ⌈H/p⌉, ⌈W/p⌉, embed_dim]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected [B, C, H, W]; a single image "
                "is images[None]"
            )
        height, width = fixed(images.shape[2]), fixed(images.shape[3])
        p = self.patch_size
        if height % p or width % p:
            images = F.pad(images, (0, -width % p, 0, -height % p))
        tokens = self.proj(images).permute(0, 2, 3, 1)
        return self.norm(tokens)


class PatchMerging(nn.Module):
    """Patch merging: four neighbours become one token, [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, 2C].

    Args:
        post_norm: LayerNorm after the reduction, width 2C (V2), instead of before it, width 4C.
    """

    def __init__(self, dim: int, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if post_norm else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = sides(x)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # (row, column) offsets (0, 0), (1, 0), (0, 1), (1, 1)
        corners = torch.cat([x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)], -1)
        if self.post_norm:
            return self.norm(self.reduction(corners))
        return self.reduction(self.norm(corners))


class Mlp(nn.Module):
    """Dense feed-forward: Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, fc2_bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=fc2_bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
