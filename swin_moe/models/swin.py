"""One hierarchical backbone for the whole Swin family; ``FAMILIES`` lists the differences.

Papers: Swin Transformer, https://arxiv.org/abs/2103.14030; Swin Transformer V2,
https://arxiv.org/abs/2111.09883; Swin-MoE, in Tutel, https://arxiv.org/abs/2206.03382. State-dict
names are the official ones. In every family any block's feed-forward may be a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from ..config import ModelConfig, MoEConfig, check_moe_blocks
from ..distributed import Group
from ..moe import MoELayer, MoEResult, build_moe
from ..moe.experts import ExpertLinear
from ..moe.router import CosineRouter, LinearRouter, SoftRouter
from ..ops import is_leaving, of_one_size, sides
from .activation_checkpoint import recomputed
from .attention import SpatialMlp, WindowAttention
from .layers import Mlp, PatchEmbed, PatchMerging
from .outputs import Outputs
from .position import resize_position_embedding

_RESETTABLE = (nn.LayerNorm, nn.Conv2d, WindowAttention, CosineRouter, SoftRouter)


class Family(NamedTuple):
    """The properties of one member of the family.

    Attributes:
        post_norm: residual post-norm, x + LN(f(x)), and patch merging with LN after its reduction;
            otherwise pre-norm, x + f(LN(x)), and LN before the reduction.
        cosine: cosine attention, otherwise the scaled dot product; None = SwinMLP's grouped layer
            over the window's positions instead of attention.
        position_bias: see :class:`WindowAttention`.
    """

    post_norm: bool
    cosine: bool | None
    position_bias: str = ""


FAMILIES = {
    "swin": Family(post_norm=False, cosine=False, position_bias="table"),
    "swinv2": Family(post_norm=True, cosine=True, position_bias="log_cpb_sigmoid"),
    "swin_moe": Family(post_norm=False, cosine=False, position_bias="log_cpb"),
    "swin_mlp": Family(post_norm=False, cosine=None),
}


def effective_window(height: int, width: int, window_size: int, shifted: bool) -> tuple[int, int]:
    """Return (window, shift) of a block on a map of tokens, clipped to the smaller side."""
    if height <= window_size or width <= window_size:
        return (height if height <= width else width), 0  # min() would stay in a graph's sizes
    return window_size, window_size // 2 if shifted else 0


class SwinBlock(nn.Module):
    """Mixing within (shifted) windows, then a feed-forward, each on a residual branch.

    Args:
        mixer: attention, or SwinMLP's grouped layer.
        extra_norm: LayerNorm on the main branch at the end of the block (V2 H and G).
    """

    def __init__(
        self,
        mixer: WindowAttention | SpatialMlp,
        mlp: nn.Module,
        dim: int,
        *,
        window_size: int,
        shifted: bool,
        post_norm: bool,
        drop_path: float,
        extra_norm: bool = False,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shifted = shifted
        self.post_norm = post_norm
        self.attn = mixer if isinstance(mixer, WindowAttention) else None
        self.spatial_mlp = mixer if isinstance(mixer, SpatialMlp) else None
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def _mix(self, x: Tensor) -> Tensor:
        window, shift = effective_window(*sides(x), self.window_size, self.shifted)
        if self.attn is not None:
            return self.attn(x, window, shift)
        assert self.spatial_mlp is not None
        return self.spatial_mlp.mix(x, shift)

    def _draw(self, x: Tensor) -> Tensor | None:
        """Draw drop path's factor of each image's branch, [B, 1, 1, 1]; None without drop path."""
        if not self.training or isinstance(self.drop_path, nn.Identity):
            return None
        return self.drop_path(x.new_ones(x.shape[0], 1, 1, 1))

    def begin(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mix x [B, H, W, C]; return x after the first branch, and the feed-forward's input.

        Args:
            keep: drop path's factors [B, 1, 1, 1], drawn outside of graphs, so that the blocks of
                a stage share one; None = 1.
        """
        if self.post_norm:
            x = x + _dropped(self.norm1(self._mix(x)), keep)
            return x, x
        x = x + _dropped(self._mix(self.norm1(x)), keep)
        return x, self.norm2(x)

    def end(self, x: Tensor, fed: Tensor, keep: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return x [B, H, W, C] after the second branch.

        Args:
            fed: the feed-forward's output, like x.
            keep: see :meth:`begin`.
            scale: see :class:`~swin_moe.moe.layer.MoEResult`.
        """
        if self.post_norm:
            fed = self.norm2(fed)
            if scale is not None:
                fed = (fed * scale).to(fed.dtype)
        x = x + _dropped(fed, keep)
        return x if self.norm3 is None else self.norm3(x)

    def dense(self, x: Tensor, keep: Tensor | None, keep_fed: Tensor | None) -> Tensor:
        """Return x [B, H, W, C] after a block without experts; factors as in :meth:`begin`."""
        x, y = self.begin(x, keep)
        return self.end(x, self.mlp(y), keep_fed, None)

    def forward(self, x: Tensor) -> tuple[Tensor, MoEResult | None]:
        """Return x [B, H, W, C] after the block, and its MoE layer's result, if it has one."""
        if not isinstance(self.mlp, MoELayer):
            return self.dense(x, self._draw(x), self._draw(x)), None
        x, y = self.begin(x, self._draw(x))
        routed: MoEResult = self.mlp(y)
        return self.end(x, routed.output, self._draw(x), routed.scale), routed


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep.to(x.dtype)


class SwinStage(nn.Module):
    """Blocks at one resolution, then patch merging (none in the last stage).

    Args:
        recomputed: number of first blocks that the backward pass computes again.
        offload: keep their inputs in host memory until then.
    """

    def __init__(
        self,
        blocks: list[SwinBlock],
        downsample: PatchMerging | None,
        recomputed: int = 0,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.recomputed, self.offload = recomputed, offload

    def forward_blocks(self, x: Tensor) -> tuple[Tensor, list[MoEResult]]:
        """Apply the blocks to x [B, H, W, C], without patch merging."""
        routed = []
        for index, block in enumerate(self.blocks):
            if index < self.recomputed and self.training and torch.is_grad_enabled():
                x, result = recomputed(block, x, offload=self.offload)
            else:
                x, result = block(x)
            if result is not None:
                routed.append(result)
        return x, routed

    def forward(self, x: Tensor) -> tuple[Tensor, list[MoEResult]]:
        x, routed = self.forward_blocks(x)
        return x if self.downsample is None else self.downsample(x), routed


class SwinTransformer(nn.Module):
    """A model of the Swin family, dense or with MoE blocks.

    For images [B, in_chans, H, W] of any size it returns :class:`Outputs` with logits
    [B, num_classes]. In an exported graph (:mod:`swin_moe.ops.leaving`) a dense model returns the
    logits alone. No process group is needed unless ``expert_group`` has more than one rank. On the
    meta device it takes no memory; ``to_empty`` and :meth:`init_weights` then make it real.

    Args:
        initialise: draw the weights; otherwise the caller calls :meth:`init_weights`.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig | None = None,
        expert_group: Group | None = None,
        *,
        initialise: bool = True,
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
        height, width = model.token_grid
        self.absolute_pos_embed: nn.Parameter | None = None
        if model.ape:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, height * width, model.embed_dim))
        self.mask_token: nn.Parameter | None = None  # SimMIM's, see :meth:`add_mask_token`
        self.pos_drop = nn.Dropout(model.drop_rate)
        self.layers = nn.ModuleList(
            self._build_stage(stage, expert_group) for stage in range(stages)
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.head: nn.Module = nn.Identity()
        if model.num_classes:
            self.head = nn.Linear(self.num_features, model.num_classes)
        if initialise:
            self.init_weights()

    def _build_stage(self, stage: int, expert_group: Group | None) -> SwinStage:
        model = self.config
        post_norm = FAMILIES[model.family].post_norm
        blocks = [self._build_block(stage, i, expert_group) for i in range(model.depths[stage])]
        last = stage == len(model.depths) - 1
        merging = None if last else PatchMerging(model.embed_dim << stage, post_norm)
        offload = model.use_checkpoint == "offload"
        return SwinStage(blocks, merging, model.recomputed_blocks(stage), offload)

    def _build_block(self, stage: int, index: int, expert_group: Group | None) -> SwinBlock:
        model, dim = self.config, self.config.embed_dim << stage
        family = FAMILIES[model.family]
        grid = [-(-side // 2**stage) for side in model.token_grid]
        built_window = effective_window(grid[0], grid[1], model.window_size, False)[0]
        mixer: WindowAttention | SpatialMlp
        if family.cosine is None:
            mixer = SpatialMlp(model.num_heads[stage], built_window)
        else:
            pretrained = model.pretrained_window_sizes or [0] * len(model.depths)
            mixer = WindowAttention(
                dim,
                model.num_heads[stage],
                built_window,
                cosine=family.cosine,
                position_bias=family.position_bias,
                pretrained_window_size=pretrained[stage],
                qkv_bias=model.qkv_bias,
                qk_scale=model.qk_scale,
                attn_drop=model.attn_drop_rate,
                chunk=model.attention_chunk,
                proj_drop=model.drop_rate,
            )
        hidden = int(dim * model.mlp_ratio)
        is_moe = stage < len(self.moe.blocks) and index in self.moe.blocks[stage]
        mlp: nn.Module
        if is_moe:
            own = self.moe.of_block(stage, index)
            mlp = build_moe(dim, hidden, own, expert_group, initialise=False)
        else:
            mlp = Mlp(dim, hidden, model.drop_rate, model.mlp_fc2_bias)
        before, blocks = sum(model.depths[:stage]) + index, sum(model.depths)
        every = model.extra_norm_every_n_blocks
        return SwinBlock(
            mixer,
            mlp,
            dim,
            window_size=built_window if family.cosine is None else model.window_size,
            shifted=index % 2 == 1,
            post_norm=family.post_norm,
            drop_path=model.drop_path_rate * before / max(blocks - 1, 1),
            extra_norm=every > 0 and (index + 1) % every == 0,
        )

    @torch.no_grad()
    def init_weights(
        self, made: Callable[[nn.Module], AbstractContextManager[None]] = lambda _: nullcontext()
    ) -> None:
        """Initialise every parameter and buffer, by the official rules.

        Linear: truncated normal with ``init_std``, bias 0; experts: ``moe.init_std``; LayerNorm:
        weight 1, bias 0. In V2 both norms of each block have weight 0, so that a block starts as
        the identity.

        Args:
            made: context of each module, entered once, in which its own parameters are set.
        """
        blocks = [b for b in self.modules() if isinstance(b, SwinBlock) and b.post_norm]
        zero = {id(norm) for block in blocks for norm in (block.norm1, block.norm2)}
        for module in self.modules():
            if module is self:
                continue
            with made(module):
                self._init_module(module)
                if id(module) in zero:
                    nn.init.zeros_(module.weight)  # type: ignore[arg-type]
        with made(self):
            for parameter in (self.absolute_pos_embed, self.mask_token):
                if parameter is not None:
                    nn.init.trunc_normal_(parameter, std=0.02)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | SpatialMlp):
            nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ExpertLinear):
            module.reset_parameters(self.moe.init_std)
        elif isinstance(module, LinearRouter):
            module.reset_parameters(self.config.init_std)
        elif isinstance(module, _RESETTABLE):
            module.reset_parameters()

    def add_mask_token(self) -> None:
        """Add the token [1, 1, C] that replaces masked patches, not yet initialised."""
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.config.embed_dim))

    def add_position(self, x: Tensor) -> Tensor:
        """Add the absolute position embedding, if any, to tokens [B, H, W, C]."""
        if self.absolute_pos_embed is not None:
            grid = sides(x)
            embedding = resize_position_embedding(
                self.absolute_pos_embed, self.config.token_grid, grid
            )
            x = x + embedding.unflatten(1, grid).to(x.dtype)
        return self.pos_drop(x)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens [B, H/p, W/p, embed_dim] of images [B, in_chans, H, W]."""
        return self.add_position(self.patch_embed(of_one_size(images)))

    def forward_stages(self, x: Tensor) -> tuple[Tensor, list[MoEResult]]:
        """Apply stages and norm: tokens [B, h, w, embed_dim] → [B, h', w', num_features]."""
        routed: list[MoEResult] = []
        for layer in self.layers:
            x, results = layer(x)
            routed += results
        return self.norm(x), routed

    def forward_features(self, images: Tensor) -> tuple[Tensor, list[MoEResult]]:
        """Return normed tokens [B, h', w', num_features] and the MoE layers' results."""
        return self.forward_stages(self.embed(images))

    def forward(self, images: Tensor) -> Outputs:
        features, results = self.forward_features(images)
        logits = self.head(features.mean((1, 2)))
        if is_leaving() and not results:
            return logits
        return Outputs.of(logits, results)
