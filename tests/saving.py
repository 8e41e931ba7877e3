"""Writes checkpoints without a training, with whole tensors from one process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from swin_moe.checkpoint import Saved, Writer, persistent_buffers, whole_fragments
from swin_moe.distributed import Group, World
from swin_moe.distributed.expert_placement import ExpertLayout, whole_layout
from swin_moe.models import expert_parameter_names

ALONE = World(0, 0, 1, torch.device("cpu"), Group(), Group())
States = Iterable[tuple[str, dict[str, Tensor]]]


def save(
    folder: Path,
    step: int,
    states: States,
    layout: ExpertLayout | None = None,
    *,
    state: dict | None = None,
    config_text: str = "",
    **options: int,
) -> Path:
    """Write a checkpoint and wait for it; raise ``OSError`` with the reason if it fails."""
    results: list[Saved] = []
    writer = Writer(folder, ALONE, results.append)
    writer.save(
        step, whole_fragments(states), layout or whole_layout(set(), 1), state=state or {},
        config_text=config_text, keep_last=options.pop("keep_last", 100), **options,
    )  # fmt: skip
    complete = writer.wait()
    assert complete == (not results[-1].error)
    if results[-1].error:
        raise OSError(results[-1].error)
    return results[-1].path


def states_of(model: torch.nn.Module) -> States:
    """Yield the states that a training of the model saves; the moments are the weights."""
    for name, parameter in model.named_parameters():
        yield name, dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), parameter)
    for name, buffer in persistent_buffers(model).items():
        yield name, {"weight": buffer}


def save_model(folder: Path, step: int, model: torch.nn.Module, config_text: str) -> Path:
    layout = whole_layout(expert_parameter_names(model), model.moe.num_experts)
    return save(folder, step, states_of(model), layout, config_text=config_text)
