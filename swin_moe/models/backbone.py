"""The backbone for detection and segmentation: normed feature maps of several strides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

from torch import Tensor, nn

from ..moe import MoEResult
from ..ops import is_leaving
from .layers import Mlp
from .outputs import Outputs
from .swin import SwinBlock, SwinStage, SwinTransformer

OutputFormat = Literal["NCHW", "NHWC"]


class SwinFeatures(nn.Module):
    """Feature maps of chosen stages, each taken before patch merging and normed by its own norm.

    Called with images [B, in_chans, H, W] of any size it returns :class:`Outputs` with a list of
    maps, one per chosen stage i: [B, C·2^i, ⌈H/s⌉, ⌈W/s⌉] or channels last, where
    s = patch_size·2^i. Norms are named ``norm0``, ``norm1``, … as in the official detection code.

    Args:
        backbone: is modified: norm, head and the stages after the last chosen one are removed.
        out_indices: ascending indices of stages.
        frozen_stages: −1 freezes nothing, 0 patch and position embedding, n also the first n
            stages. What is frozen stays in eval mode.
        freeze_moe: freeze routers and experts wherever they are.

    Attributes:
        num_features: channels of each output; ``channels`` is the same list.
        strides: pixels of each output's cell.

    Raises:
        ValueError: an argument that does not fit the backbone.
    """

    def __init__(
        self,
        backbone: SwinTransformer,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        *,
        output_format: OutputFormat = "NCHW",
        frozen_stages: int = -1,
        freeze_moe: bool = False,
    ) -> None:
        super().__init__()
        config = backbone.config
        out = tuple(out_indices)
        _check(out, len(config.depths), output_format, frozen_stages)
        self.backbone = backbone
        self.out_indices = out
        self.output_format = output_format
        self.frozen_stages = frozen_stages
        self.freeze_moe = freeze_moe
        self.num_features = [config.embed_dim << i for i in out]
        self.channels = self.num_features
        self.strides = [config.patch_size << i for i in out]
        # What takes no part goes: DDP waits for a gradient of every parameter.
        del backbone.norm, backbone.head, backbone.layers[out[-1] + 1 :]
        self._stages()[-1].downsample = None
        for i, channels in zip(out, self.num_features, strict=True):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if frozen_stages >= 0 and backbone.absolute_pos_embed is not None:
            backbone.absolute_pos_embed.requires_grad_(False)
        self.train(backbone.training)

    def _stages(self) -> list[SwinStage]:
        return cast("list[SwinStage]", list(self.backbone.layers))

    def _frozen_modules(self) -> list[nn.Module]:
        frozen: list[nn.Module] = []
        if self.frozen_stages >= 0:
            frozen = [self.backbone.patch_embed, self.backbone.pos_drop]
            frozen += self._stages()[: self.frozen_stages]
        if self.freeze_moe:
            blocks = [block for block in self.modules() if isinstance(block, SwinBlock)]
            frozen += [block.mlp for block in blocks if not isinstance(block.mlp, Mlp)]
        return frozen

    def train(self, mode: bool = True) -> SwinFeatures:
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, images: Tensor) -> Outputs:
        x = self.backbone.embed(images)
        maps: list[Tensor] = []
        results: list[MoEResult] = []
        for i, layer in enumerate(self._stages()):
            x, routed = layer.forward_blocks(x)
            results += routed
            if i in self.out_indices:
                normed = self.get_submodule(f"norm{i}")(x)
                channels_first = self.output_format == "NCHW"
                maps.append(normed.permute(0, 3, 1, 2).contiguous() if channels_first else normed)
            if layer.downsample is not None:
                x = layer.downsample(x)
        if is_leaving() and not results:
            return maps  # type: ignore[return-value]
        return Outputs.of(maps, results)


def _check(out: tuple[int, ...], stages: int, output_format: str, frozen_stages: int) -> None:
    ascending = all(a < b for a, b in pairwise(out))
    if not out or not ascending or out[0] < 0 or out[-1] >= stages:
        raise ValueError(f"out_indices={out} must be ascending stages from 0 to {stages - 1}")
    if output_format not in ("NCHW", "NHWC"):
        raise ValueError(f"output_format={output_format!r} must be 'NCHW' or 'NHWC'")
    if not -1 <= frozen_stages <= out[-1] + 1:
        raise ValueError(f"frozen_stages={frozen_stages} must be from -1 to {out[-1] + 1}")
