"""Microsoft's names: V1, V2, SwinMLP, Swin-MoE, SimMIM's encoders and detectors' backbones.

Ours follow them, except that official experts are Tutel's layers and official files hold buffers.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ...config import ModelConfig
from .base import BUFFERS, Dialect, Kind
from .ours import BLOCK, DENSE, has, has_layers
from .rules import DialectError, Rule, State, renames
from .windows import Windows, attention_mask, position_buffers, shrinks, sides

MLP, TUTEL = BLOCK + "mlp.", BLOCK + "mlp._moe_layer."
EXPERTS = {
    "router.weight": "gates.0.wg.weight",
    "router.temperature": "gates.0.temperature",
    "router.cosine_projector.{p}": "gates.0.cosine_projector.{p}",
    "router.sim_matrix": "gates.0.sim_matrix",
    "experts.fc1.weight": "experts.batched_fc1_w",
    "experts.fc1.bias": "experts.batched_fc1_bias",
    "experts.fc2.bias": "experts.batched_fc2_bias",
}
# SimMIM's released files are older than the name cpb_mlp.
SIMMIM = {"cpb_mlp.0.{p}": "rpe_mlp.0.{p}", "cpb_mlp.2.weight": "rpe_mlp.2.weight"}


def _transposed(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.transpose(1, 2).contiguous() for tensor in tensors]


FC2 = Rule(  # ours [E, dim, hidden], theirs [E, hidden, dim]
    (MLP + "experts.fc2.weight",),
    (TUTEL + "experts.batched_fc2_w",),
    read=_transposed,
    write=_transposed,
)


def _rules(kind: Kind) -> list[Rule]:
    attention = BLOCK + "attn."
    return [
        *DENSE,
        *renames(EXPERTS, MLP, TUTEL),
        FC2,
        *renames(SIMMIM, attention, attention),
        *renames({"norm.{p}": f"norm{kind.stages - 1}.{{p}}"}),  # detection: the last output's
    ]


def _looks_like(names: Collection[str]) -> bool:
    our_experts = has(r"layers\.\d+\.blocks\.\d+\.mlp\.(router|experts)\.", names)
    return has_layers(names, merging_first=False) and not our_experts


def _absent_biases(state: State) -> set[str]:
    """Return Tutel's biases of fc2 that stand for none: all zero, with dense fc2 without bias."""
    biases = {name for name in state if name.endswith("._moe_layer.experts.batched_fc2_bias")}
    dense = any(name.endswith(".mlp.fc2.weight") for name in state)
    dense_bias = any(name.endswith(".mlp.fc2.bias") for name in state)
    absent = dense and not dense_bias and not any(state[name].any() for name in biases)
    return biases if absent else set()


def _extras(model: ModelConfig, state: State) -> State:
    extras: State = {}
    if model.family != "swin_mlp":
        extras |= position_buffers(model, BLOCK + "attn")
        extras |= _masks(model)
    for name, weight in state.items():
        if name.endswith(".batched_fc2_w"):
            layer = name.removesuffix("experts.batched_fc2_w")
            extras[f"{layer}_num_global_experts"] = torch.tensor(weight.shape[0])
            bias = f"{layer}experts.batched_fc2_bias"
            if bias not in state:
                extras[bias] = weight.new_zeros(weight.shape[0], weight.shape[2])
    return extras


def _masks(model: ModelConfig) -> State:
    state: State = {}
    for stage, depth in enumerate(model.depths):
        height, width = sides(model, stage)
        window, shifted = shrinks(model, stage)[0]
        for block in range(1, depth, 2) if shifted else ():
            name = f"layers.{stage}.blocks.{block}.attn_mask"
            state[name] = attention_mask(height, width, window)
    return state


def _windows(model: ModelConfig, stage: int) -> Windows:
    """Return our windows; refuse sizes at which the official code cannot merge patches."""
    height, width = sides(model, stage)
    if stage < len(model.depths) - 1 and (height % 2 or width % 2):
        raise DialectError(
            f"official code cannot run at img_size={model.img_size}: it cannot merge the "
            f"{height}×{width} tokens of stage {stage}"
        )
    return shrinks(model, stage)


ONLY = {"extra_norm_every_n_blocks": 0, "mlp_fc2_bias": True}
OFFICIAL = Dialect(
    "official",
    example="layers.0.blocks.0.norm1.weight",
    looks_like=_looks_like,
    rules=_rules,
    only={
        "swin": ONLY,
        "swinv2": ONLY,
        "swin_mlp": ONLY,
        "swin_moe": {"extra_norm_every_n_blocks": 0},
    },
    windows=dict.fromkeys(("swin", "swinv2", "swin_mlp", "swin_moe"), _windows),
    prefix=r"(module\.)?((encoder|backbone)\.)?",
    dropped=rf"{BUFFERS}|.*\._num_global_experts|decoder\..*|mask_token|norm\d+\..*|(neck|\w+_head)\..*",
    spare=_absent_biases,
    extras=_extras,
    moe=True,
)
