"""Folders of ``DeepSpeedEngine.save_checkpoint``: fp32 weights joined from every rank's parts.

ZeRO 1 and 2 concatenate the parameters of each group and cut the result into one part per rank.
ZeRO-3 cuts each parameter, and a rank's file has the concatenation of its parts. Experts of
DeepSpeed's own MoE layers have separate files and become Tutel's stacked ones.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.reading import read_text
from .adapters import State
from .file_kind import WeightsError
from .safe_pickle import load_pickled, tensors_of

_EXPERT = re.compile(
    r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.fc([12])\.(weight|bias)"
)
_GATE = ".deepspeed_moe.gate.wg.weight"
_TAG_LIMIT = 4096  # bytes
_PARTITIONS = "single_partition_of_fp32_groups"


def is_deepspeed_folder(path: Path) -> bool:
    """Return whether a folder is such a checkpoint, or holds ``latest``, which names one."""
    return (path / "latest").is_file() or _model_file(path) is not None


def read_deepspeed_folder(path: Path) -> State:
    """Read the weights: fp32 masters if the folder has them, otherwise the module's.

    Raises:
        WeightsError: a file is missing, damaged or could run code; or the model is tensor-parallel.
    """
    folder = _newest(path)
    model_file = _model_file(folder)
    if model_file is None:
        raise WeightsError(f"{folder}: no *mp_rank_00_model_states.pt")
    if list(folder.glob("*mp_rank_01_model_states.pt")):
        raise WeightsError(f"{folder}: tensor-parallel parts cannot be put together here")
    model = load_pickled(model_file)
    if not isinstance(model, dict) or not isinstance(model.get("module"), dict):
        raise WeightsError(f"{model_file}: no weights found (looked for module)")
    state = {name: t for name, t in model["module"].items() if isinstance(t, Tensor)}
    experts = sorted(folder.glob("layer_*_expert_*_mp_rank_00_model_states.pt"))
    if experts:
        for file in experts:
            state |= tensors_of(load_pickled(file), file)
        try:
            return _stack_experts(state)
        except RuntimeError as error:
            raise WeightsError(f"{folder}: experts of different shapes ({error})") from None
    ranks = _sorted_by_rank(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    if ranks:
        try:
            state |= _masters(model, [load_pickled(file)["optimizer_state_dict"] for file in ranks])
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError,
                RuntimeError) as error:  # fmt: skip
            raise WeightsError(
                f"{folder}: the optimizer's files cannot be put together "
                f"({type(error).__name__}: {error})"
            ) from None
    elif any(tensor.numel() == 0 for tensor in state.values()):
        raise WeightsError(f"{folder}: *_optim_states.pt are missing, which hold ZeRO-3's weights")
    return state


def _newest(path: Path) -> Path:
    if not (path / "latest").is_file():
        return path
    tag = read_text(path / "latest", _TAG_LIMIT).strip()
    if Path(tag).name != tag or not (path / tag).is_dir():
        raise WeightsError(f"{path}/latest names {tag!r:.80}, which is no folder there")
    return path / tag


def _model_file(folder: Path) -> Path | None:
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _sorted_by_rank(files: Any) -> list[Path]:
    """Sort files by rank; raise ``WeightsError`` if a rank's is missing."""
    by_rank = {int(re.findall(r"zero_pp_rank_(\d+)_", file.name)[0]): file for file in files}
    for rank in range(max(by_rank, default=-1) + 1):
        if rank not in by_rank:
            folder = next(iter(by_rank.values())).parent
            raise WeightsError(f"{folder}: the optimizer's file of rank {rank} is missing")
    return [by_rank[rank] for rank in sorted(by_rank)]


def _masters(model: dict[str, Any], ranks: list[dict[str, Any]]) -> State:
    """Return fp32 weights by name from the states of all ranks' optimizers."""
    stage, count = int(ranks[0]["zero_stage"]), ranks[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != len(ranks):
        raise RuntimeError(f"{count} ranks wrote it, {len(ranks)} files are there")
    state: State = {}
    if stage == 3:
        flats = [torch.cat(rank["fp32_flat_groups"]) for rank in ranks]
        start = 0
        for shapes in model["param_shapes"]:
            for name, shape in shapes.items():
                size = -(-math.prod(shape) // len(ranks))
                whole = torch.cat([flat[start : start + size] for flat in flats])
                state[name] = whole[: math.prod(shape)].view(shape)
                start += size
        return state
    for group, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([rank[_PARTITIONS][group] for rank in ranks])
        paddings = ranks[0].get("param_alignment_paddings")
        start = 0
        for index, (name, shape) in enumerate(shapes.items()):
            state[name] = flat[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape) + (paddings[group][index] if paddings else 0)
    return state


def _stack_experts(state: State) -> State:
    """Stack single experts under Tutel's names, and rename the gate."""
    stacked: dict[str, dict[int, Tensor]] = {}
    result: State = {}
    for name, tensor in state.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            result[name.replace(_GATE, "._moe_layer.gates.0.wg.weight")] = tensor
            continue
        layer, expert, number, kind = match.groups()
        if (number, kind) == ("2", "weight"):
            tensor = tensor.t()
        suffix = {"weight": "w", "bias": "bias"}[kind]
        key = f"{layer}._moe_layer.experts.batched_fc{number}_{suffix}"
        stacked.setdefault(key, {})[int(expert)] = tensor
    for key, experts in stacked.items():
        if sorted(experts) != list(range(len(experts))):
            missing = min(set(range(max(experts))) - set(experts))
            raise WeightsError(f"{key}: the file of expert {missing} is missing")
        result[key] = torch.stack([experts[index] for index in range(len(experts))])
    return result
