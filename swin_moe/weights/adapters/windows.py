"""The windows of each implementation at a model's resolution, and their buffers.

Implementations differ where a window is not smaller than the feature map. A translation is refused
if the other implementation would compute another function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import ModelConfig
from ...models.position import relative_coords, relative_index
from .rules import State, fill

Windows = list[tuple[int, bool]]  # for height and width: the window, and whether odd blocks shift


def sides(model: ModelConfig, stage: int) -> tuple[int, int]:
    """Return a stage's (height, width) in tokens."""
    height, width = model.token_grid
    return -(-height // 2**stage), -(-width // 2**stage)


def shrinks(model: ModelConfig, stage: int) -> Windows:
    """Follow our and the official rule: clip to the smaller side; one window never shifts."""
    small = min(sides(model, stage))
    return [(min(small, model.window_size), small > model.window_size)] * 2


def shrinks_by_axis(model: ModelConfig, stage: int) -> Windows:
    """Follow timm: each side by itself."""
    size = model.window_size
    return [(min(side, size), side > size) for side in sides(model, stage)]


def shrinks_by_height(model: ModelConfig, stage: int) -> Windows:
    """Follow transformers' V2: the height decides for both sides, halved rounding down."""
    height = (model.image_sides[0] // model.patch_size) >> stage
    return [(min(height, model.window_size), height > model.window_size)] * 2


def never_shrinks(model: ModelConfig, stage: int) -> Windows:
    """Follow transformers' and OpenMMLab's V1: each stage's table has the configured window.

    mmseg, unlike mmpretrain, shifts even if one window covers the map; its images are larger.
    """
    return [(model.window_size, min(sides(model, stage)) > model.window_size)] * 2


def never_shrinks_by_axis(model: ModelConfig, stage: int) -> Windows:
    """Follow torchvision: pad small maps to the configured window, each side by itself."""
    return [(model.window_size, side > model.window_size) for side in sides(model, stage)]


def position_buffers(model: ModelConfig, attention: str, *, flat_index: bool = False) -> State:
    """Return ``relative_position_index`` and, except for V1, ``relative_coords_table`` per block.

    Args:
        attention: template of the attention's name.
        flat_index: flatten the index.
    """
    state: State = {}
    pretrained = model.pretrained_window_sizes or [0] * len(model.depths)
    for stage, depth in enumerate(model.depths):
        window = shrinks(model, stage)[0][0]
        offsets = 2 * window - 1
        for block in range(depth):
            name = fill(attention, {"s": stage, "b": block})
            index = relative_index(window)
            state[f"{name}.relative_position_index"] = index.flatten() if flat_index else index
            if model.family != "swin":
                coords = relative_coords(window, pretrained[stage])
                state[f"{name}.relative_coords_table"] = coords.view(1, offsets, offsets, 2)
    return state


def attention_mask(height: int, width: int, window: int) -> Tensor:
    """Return the official mask of a shifted block, [windows, N, N]; the window divides both sides.

    It is −100 between regions that only the roll made neighbours, and 0 elsewhere.
    """
    rows, cols = (_regions(side, window) for side in (height, width))
    regions = 3 * rows[:, None] + cols
    tiles = regions.unflatten(0, (-1, window)).unflatten(2, (-1, window))
    tiles = tiles.transpose(1, 2).reshape(-1, window * window)
    return torch.where(tiles[:, None] == tiles[:, :, None], 0.0, -100.0)


def _regions(side: int, window: int) -> Tensor:
    position = torch.arange(side)
    return (position >= side - window).int() + (position >= side - window // 2).int()
