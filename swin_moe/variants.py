"""Named model variants: the published Swin V2 and Swin-MoE tables as plain data.

Each entry holds defaults for the config sections ``model`` and ``moe``; whatever a YAML file or a
call of ``build_model(name, **overrides)`` states wins over them.
"""

from __future__ import annotations

from itertools import product
from typing import Any

Sections = dict[str, dict[str, Any]]

_SHAPES: Sections = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
}
# Every second block of stage 2 and the last block of stage 3 (10 layers), as in the Swin-MoE paper.
_MOE_BLOCKS = [[], [], list(range(1, 18, 2)), [1]]
_DROP_PATH = {"tiny": 0.2, "small": 0.3, "base": 0.5, "large": 0.2}


def _swinv2(size: str, img_size: int, window_size: int, **model: Any) -> Sections:
    shape = {"img_size": img_size, "window_size": window_size, "drop_path_rate": _DROP_PATH[size]}
    return {"model": {**_SHAPES[size], **shape, **model}}


def _build_table() -> dict[str, Sections]:
    table: dict[str, Sections] = {}
    for size in ("tiny", "small", "base"):
        for window in (8, 16):
            table[f"swinv2_{size}_window{window}_256"] = _swinv2(size, 256, window)
    for size in _SHAPES:
        table[f"swinv2_{size}_window12_192_22k"] = _swinv2(
            size, 192, 12, num_classes=21841, drop_path_rate=0.2
        )
    for size in ("base", "large"):
        for window, img_size in ((16, 256), (24, 384)):
            table[f"swinv2_{size}_window12to{window}_192to{img_size}_22kto1k"] = _swinv2(
                size,
                img_size,
                window,
                drop_path_rate=0.2,
                pretrained_window_sizes=[12, 12, 12, 6],
            )
    for size, num_experts in product(("small", "base"), (8, 16, 32, 64)):
        name = f"swin_moe_{size}_{num_experts}expert_window12_192_22k"
        table[name] = _swinv2(size, 192, 12, num_classes=21841, drop_path_rate=0.2) | {
            "moe": {
                "blocks": _MOE_BLOCKS,
                "num_experts": num_experts,
                "init_std": 0.005,
                "drop_rate": 0.1,
                "fc2_bias": False,
            }
        }
    return table


VARIANTS: dict[str, Sections] = _build_table()
