"""Named model variants: the published tables of the Swin family as plain data.

Each variant has defaults for the config sections ``model`` and ``moe``; values in a YAML file or a
call of ``build_model(name, **overrides)`` replace them. ``PUBLISHED`` has figures of the papers and
the official repository, with which tests compare our counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Sections = dict[str, dict[str, Any]]


class Published(NamedTuple):
    """Figures of the official tables, as printed; None if there is none.

    Attributes:
        parameters: in millions.
        gmacs: multiply-accumulates of one image's forward pass, in 10⁹.
        top1: ImageNet-1K accuracy in percent (for 22K models that on held-out ImageNet-22K).
    """

    parameters: str
    gmacs: str | None = None
    top1: float | None = None


# Models with sizes from the config, such as ``model.name: swinv2``.
FAMILIES: dict[str, Sections] = {
    "swin": {"model": {"family": "swin"}},
    "swinv2": {"model": {"family": "swinv2"}},
    "swin_mlp": {"model": {"family": "swin_mlp"}},
    "swin_moe": {"model": {"family": "swin_moe"}},
    "swinv2_moe": {"model": {"family": "swinv2"}},
}

VARIANTS: dict[str, Sections] = {}
PUBLISHED: dict[str, Published] = {}
# Former defaults of variants, which a run that began with them keeps.
FORMER: dict[str, Sections] = {}

_SHAPES: Sections = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
    # Heads of H, G and SimMIM's giant are not published; as in the family they are 32 wide.
    "huge": {"embed_dim": 352, "depths": [2, 2, 18, 2], "num_heads": [11, 22, 44, 88]},
    "giant": {"embed_dim": 512, "depths": [2, 2, 42, 4], "num_heads": [16, 32, 64, 128]},
    "simmim_giant": {"embed_dim": 448, "depths": [2, 2, 18, 2], "num_heads": [14, 28, 56, 112]},
}
_22K: dict[str, Any] = {"num_classes": 21841}


def default_moe_blocks(depths: list[int]) -> list[list[int]]:
    """Return Swin-MoE's blocks: every second one of the last stage but one, and the last block."""
    blocks: list[list[int]] = [[] for _ in depths]
    blocks[-1] = [depths[-1] - 1]
    if len(depths) > 1:
        blocks[-2] = list(range(1, depths[-2], 2))
    return blocks


def _add(
    name: str,
    family: str,
    size: str,
    img_size: int,
    window_size: int,
    drop_path_rate: float,
    published: Published | None = None,
    *,
    moe: dict[str, Any] | None = None,
    **model: Any,
) -> None:
    VARIANTS[name] = {
        "model": {
            "family": family,
            **_SHAPES[size],
            "img_size": img_size,
            "window_size": window_size,
            "drop_path_rate": drop_path_rate,
            **model,
        },
        "moe": moe or {},
    }
    if published:
        PUBLISHED[name] = published


def _add_v1() -> None:
    for size, drop, row in (
        ("tiny", 0.2, Published("28.288", "4.49", 81.2)),
        ("small", 0.3, Published("49.606", "8.75", 83.2)),
        ("base", 0.5, Published("87.768", "15.44", 83.5)),
    ):
        _add(f"swin_{size}_patch4_window7_224", "swin", size, 224, 7, drop, row)
    row = Published("87.90", "47.11", 84.5)
    _add("swin_base_patch4_window12_384", "swin", "base", 384, 12, 0.5, row)
    for size, drop, row in (
        ("tiny", 0.1, Published("28.288", "4.49", 80.9)),
        ("small", 0.2, Published("49.606", "8.75", 83.2)),
        ("base", 0.2, Published("87.768", "15.44", 85.2)),
        ("large", 0.2, Published("196.53", "34.49", 86.3)),
    ):
        _add(f"swin_{size}_patch4_window7_224_22k", "swin", size, 224, 7, drop, **_22K)
        _add(f"swin_{size}_patch4_window7_224_22kto1k", "swin", size, 224, 7, drop, row)
    for size, row in (
        ("base", Published("87.90", "47.11", 86.4)),
        ("large", Published("196.74", "103.95", 87.3)),
    ):
        _add(f"swin_{size}_patch4_window12_384_22k", "swin", size, 384, 12, 0.2, **_22K)
        _add(f"swin_{size}_patch4_window12_384_22kto1k", "swin", size, 384, 12, 0.2, row)
    row = Published("28.31", "5.93", 81.6)
    heads = [4, 8, 16, 32]
    name = "swin_tiny_c24_patch4_window8_256"
    _add(name, "swin", "tiny", 256, 8, 0.2, row, num_heads=heads)


def _add_v2() -> None:
    for size, drop, row8, row16 in (
        ("tiny", 0.2, Published("28.347", "5.93", 81.8), Published("28.347", "6.61", 82.8)),
        ("small", 0.3, Published("49.728", "11.51", 83.7), Published("49.728", "12.65", 84.1)),
        ("base", 0.5, Published("87.919", "20.29", 84.2), Published("87.919", "21.80", 84.6)),
    ):
        _add(f"swinv2_{size}_window8_256", "swinv2", size, 256, 8, drop, row8)
        _add(f"swinv2_{size}_window16_256", "swinv2", size, 256, 16, drop, row16)
    for size, published in (
        ("tiny", None),
        ("small", None),
        ("base", Published("109.28", "11.78")),
        ("large", Published("228.77", "26.00")),
    ):
        name = f"swinv2_{size}_window12_192_22k"
        _add(name, "swinv2", size, 192, 12, 0.2, published, **_22K)
    for size, img_size, window, row in (
        ("base", 256, 16, Published("87.92", "21.80", 86.2)),
        ("base", 384, 24, Published("87.92", "54.75", 87.1)),
        ("large", 256, 16, Published("196.74", "47.49", 86.9)),
        ("large", 384, 24, Published("196.74", "115.42", 87.6)),
    ):
        name = f"swinv2_{size}_window12to{window}_192to{img_size}_22kto1k"
        pretrained = [12, 12, 12, 6]
        _add(name, "swinv2", size, img_size, window, 0.2, row, pretrained_window_sizes=pretrained)
    norm: dict[str, Any] = {"extra_norm_every_n_blocks": 6}
    for size, row in (("huge", Published("658")), ("giant", Published("3.0e3"))):
        _add(f"swinv2_{size}_window12_192", "swinv2", size, 192, 12, 0.2, row, **norm)
    row = Published("1.06e3")
    _add("swinv2_simmim_giant_window12_192", "swinv2", "simmim_giant", 192, 12, 0.2, row)


def _add_mlp() -> None:
    for width, heads, row in (
        (24, 4, Published("20.39", "4.03", 79.4)),
        (12, 8, Published("21.15", "4.03", 79.6)),
        (6, 16, Published("22.68", "4.03", 79.7)),
    ):
        name = f"swin_mlp_tiny_c{width}_patch4_window8_256"
        num_heads = [heads << stage for stage in range(4)]
        _add(name, "swin_mlp", "tiny", 256, 8, 0.2, row, num_heads=num_heads)
    row = Published("60.66", "10.42", 81.3)
    _add("swin_mlp_base_patch4_window7_224", "swin_mlp", "base", 224, 7, 0.5, row)


def _add_moe() -> None:
    """Add the official Swin-MoE, and ours, with the same placement and recipe on Swin V2.

    Blocks of Swin V2 have their norm after the experts, where it would cancel a token's only gate.
    Our models therefore apply the gate after the norm. Evaluation drops no token, see docs/moe.md.
    """
    for size, experts, row in (
        ("small", 0, Published("65.8", top1=35.5)),
        ("small", 8, Published("173.3", top1=36.8)),
        ("small", 16, Published("296.1", top1=37.6)),
        ("small", 32, Published("541.8", top1=37.4)),
        ("small", 64, Published("1033", top1=37.8)),
        ("small", 128, Published("2016", top1=37.4)),
        ("base", 0, Published("109.3", top1=37.3)),
        ("base", 8, Published("300.3", top1=38.1)),
        ("base", 16, Published("518.7", top1=38.7)),
        ("base", 32, Published("955.3", top1=38.6)),
        ("base", 64, None),
    ):
        kind = f"{experts}expert" if experts else "dense"
        name = f"{size}_{kind}_window12_192_22k"
        drop = 0.3 if size == "base" and experts else 0.2
        moe: dict[str, Any] = {}
        model: dict[str, Any] = {**_22K, "mlp_fc2_bias": False}
        if experts:
            blocks = default_moe_blocks(_SHAPES[size]["depths"])
            moe = {"blocks": blocks, "num_experts": experts, "init_std": 0.005}
            moe |= {"drop_rate": 0.1, "fc2_bias": False}
            model |= {"init_std": 0.005}
            ours = {**moe, "gate_after_norm": True}
            _add(f"swinv2_moe_{name}", "swinv2", size, 192, 12, drop, moe=ours, **_22K)
            before = {"drop_path_rate": 0.2}
            FORMER[f"swinv2_moe_{name}"] = {"model": before, "moe": {"gate_after_norm": False}}
            official: Sections = {"model": before, "moe": {"eval_capacity_factor": 1.25}}
            FORMER[f"swin_moe_{name}"] = FORMER[f"swin_moe_{name}_cosine"] = official
        if experts == 32:
            cosine = {**moe, "router": "cosine"}
            _add(f"swin_moe_{name}_cosine", "swin_moe", size, 192, 12, drop, moe=cosine, **model)
        _add(f"swin_moe_{name}", "swin_moe", size, 192, 12, drop, row, moe=moe, **model)


_add_v1()
_add_v2()
_add_mlp()
_add_moe()
