"""The hierarchical Swin V2 backbone; each block's feed-forward is dense or a mixture of experts.

Paper: Swin Transformer V2, https://arxiv.org/abs/2111.09883. Residual post-norm, cosine attention
and log-spaced continuous position bias; state-dict names are the official ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..config import ModelConfig, MoEConfig, check_moe_blocks
from ..distributed import Group
from ..moe import MoEResult, build_moe
from ..moe.experts import Experts
from .attention import WindowAttention
from .layers import Mlp, PatchEmbed, PatchMerging


class MoEOutput(NamedTuple):
    """Output of a model with MoE layers.

    Attributes:
        logits: [B, num_classes].
        aux_loss: scalar, sum of the layers' weighted balance losses.
        counts: [layers, E] int64, assignments per expert on this rank.
        dropped: [layers] int64, assignments that found no slot.
    """

    logits: Tensor
    aux_loss: Tensor
    counts: Tensor
    dropped: Tensor


def effective_window(height: int, width: int, window_size: int, shifted: bool) -> tuple[int, int]:
    """(window, shift) of a block at a resolution in tokens: clipped to the smaller side."""
    if min(height, width) <= window_size:
        return min(height, width), 0
    return window_size, window_size // 2 if shifted else 0


class SwinBlock(nn.Module):
    """x += DropPath(LN(attention(x))); x += DropPath(LN(feed-forward(x)))."""

    def __init__(
        self,
        attn: WindowAttention,
        mlp: nn.Module,
        dim: int,
        *,
        window_size: int,
        shifted: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shifted = shifted
        self.attn = attn
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, MoEResult | None]:
        """x [B, H, W, C] to the same shape, and the MoE layer's result where the block has one."""
        window, shift = effective_window(x.shape[1], x.shape[2], self.window_size, self.shifted)
        x = x + self.drop_path(self.norm1(self.attn(x, window, shift)))
        fed = self.mlp(x)
        routed = fed if isinstance(fed, MoEResult) else None
        x = x + self.drop_path(self.norm2(fed if routed is None else routed.output))
        return x, routed


class SwinStage(nn.Module):
    """Blocks at one resolution, then patch merging (none in the last stage)."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, list[MoEResult]]:
        routed = []
        for block in self.blocks:
            x, result = block(x)
            if result is not None:
                routed.append(result)
        return x if self.downsample is None else self.downsample(x), routed


class SwinTransformer(nn.Module):
    """Swin V2, dense or with MoE blocks.

    Called with images [B, in_chans, H, W] of any size it gives logits [B, num_classes], or with
    MoE blocks a :class:`MoEOutput`. No process group is needed unless ``expert_group`` has more
    than one rank.
    """

    def __init__(
        self, model: ModelConfig, moe: MoEConfig | None = None, expert_group: Group | None = None
    ) -> None:
        super().__init__()
        self.config = model
        self.moe = moe or MoEConfig()
        check_moe_blocks(model, self.moe)
        stages = len(model.depths)
        self.num_features = model.embed_dim << (stages - 1)
        self.patch_embed = PatchEmbed(
            model.patch_size, model.in_chans, model.embed_dim, model.patch_norm
        )
        grid = -(-model.img_size // model.patch_size)
        self.absolute_pos_embed: nn.Parameter | None = None
        if model.ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, grid * grid, model.embed_dim))
        self.pos_drop = nn.Dropout(model.drop_rate)
        rates = torch.linspace(0, model.drop_path_rate, sum(model.depths), device="cpu").tolist()
        self.layers = nn.ModuleList(
            self._build_stage(stage, grid, rates, expert_group) for stage in range(stages)
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.head: nn.Module = nn.Identity()
        if model.num_classes:
            self.head = nn.Linear(self.num_features, model.num_classes)
        self.reset_parameters()

    def _build_stage(
        self, stage: int, grid: int, rates: list[float], expert_group: Group | None
    ) -> SwinStage:
        model = self.config
        dim = model.embed_dim << stage
        for _ in range(stage):
            grid = -(-grid // 2)
        pretrained = model.pretrained_window_sizes or [0] * len(model.depths)
        moe_blocks = self.moe.blocks[stage] if stage < len(self.moe.blocks) else []
        hidden = int(dim * model.mlp_ratio)
        blocks = []
        for index in range(model.depths[stage]):
            attn = WindowAttention(
                dim,
                model.num_heads[stage],
                effective_window(grid, grid, model.window_size, False)[0],
                pretrained_window_size=pretrained[stage],
                qkv_bias=model.qkv_bias,
                attn_drop=model.attn_drop_rate,
                proj_drop=model.drop_rate,
            )
            mlp: nn.Module
            if index in moe_blocks:
                mlp = build_moe(dim, hidden, self.moe, expert_group)
            else:
                mlp = Mlp(dim, hidden, model.drop_rate)
            drop_path = rates[sum(model.depths[:stage]) + index]
            blocks.append(
                SwinBlock(
                    attn,
                    mlp,
                    dim,
                    window_size=model.window_size,
                    shifted=index % 2 == 1,
                    drop_path=drop_path,
                )
            )
        last = stage == len(model.depths) - 1
        return SwinStage(blocks, None if last else PatchMerging(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear: truncated normal 0.02, bias 0; block norms 0, so a block starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                module.reset_parameters(self.moe.init_std)
        for module in self.modules():
            if isinstance(module, SwinBlock):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def moe_layer_names(self) -> list[str]:
        """Names such as ``layers.2.blocks.1``, in the order of :class:`MoEOutput`'s rows."""
        return [
            f"layers.{stage}.blocks.{block}"
            for stage, blocks in enumerate(self.moe.blocks)
            for block in sorted(blocks)
        ]

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to tokens [B, H/p, W/p, embed_dim]."""
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + self._position_embedding(x.shape[1], x.shape[2]).to(x.dtype)
        return self.pos_drop(x)

    def _position_embedding(self, height: int, width: int) -> Tensor:
        assert self.absolute_pos_embed is not None
        _, tokens, dim = self.absolute_pos_embed.shape
        side = round(tokens**0.5)
        grid = self.absolute_pos_embed.view(1, side, side, dim)
        if (height, width) == (side, side):
            return grid
        resized = F.interpolate(
            grid.permute(0, 3, 1, 2).float(), (height, width), mode="bicubic", align_corners=False
        )
        return resized.permute(0, 2, 3, 1)

    def forward_features(self, images: Tensor) -> tuple[Tensor, list[MoEResult]]:
        """Pooled features [B, num_features] and the MoE layers' results."""
        x = self.embed(images)
        routed: list[MoEResult] = []
        for layer in self.layers:
            x, results = layer(x)
            routed += results
        return self.norm(x).mean((1, 2)), routed

    def forward(self, images: Tensor) -> Tensor | MoEOutput:
        features, routed = self.forward_features(images)
        logits = self.head(features)
        if not routed:
            return logits
        return MoEOutput(
            logits,
            torch.stack([result.aux_loss for result in routed]).sum(),
            torch.stack([result.counts for result in routed]),
            torch.stack([result.dropped for result in routed]),
        )
