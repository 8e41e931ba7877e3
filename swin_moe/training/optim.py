"""Parameter groups, the optimizer and its schedule, by the Swin recipes."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from ..config import REFERENCE_BATCH, OptimizerConfig, ScheduleConfig
from ..models import expert_parameter_names
from ..models.build import layer_id
from .adamw import PairedAdamW

# Parts of names, under any prefix, that are never decayed; so are 1-D tensors and biases.
NO_DECAY = (
    "absolute_pos_embed",
    "mask_token",
    "cpb_mlp",
    "logit_scale",
    "relative_position_bias_table",
    "temperature",
    "cosine_projector",
    "sim_matrix",
)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: the official rule, stacked expert biases included."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: of one that ZeRO-3 has cut
    if len(shape) <= 1 or name.endswith(".bias"):
        return False
    return not any(part in name for part in NO_DECAY)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Up to four groups, dense and expert parameters, decayed and not; with layer decay per layer.

    Expert groups carry ``moe: True``. With ``layer_decay`` < 1 each group carries ``lr_scale``,
    by which timm's schedules multiply its rate: layer_decay^(layers above it). A group's order of
    parameters is the model's.
    """
    experts = expert_parameter_names(model)
    depths: list[int] = model.config.depths  # type: ignore[assignment, union-attr]
    chosen: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            above = sum(depths) + 1 - layer_id(name, depths) if layer_decay < 1 else 0
            key = (name in experts, not decays(name, parameter), above)
            chosen.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for moe, undecayed, above in sorted(chosen):
        rate = 0.0 if undecayed else weight_decay
        params = chosen[moe, undecayed, above]
        groups.append({"params": params, "weight_decay": rate, "moe": moe})
        if layer_decay < 1:
            groups[-1]["lr_scale"] = layer_decay**above
    return groups


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: OptimizerConfig, global_batch: int
) -> torch.optim.Optimizer:
    """AdamW at the peak rate base_lr × global batch / 512, times ``lr_scale`` of the group."""
    peak = optimizer.base_lr * global_batch / REFERENCE_BATCH
    betas = (optimizer.betas[0], optimizer.betas[1])
    adamw: torch.optim.Optimizer
    if optimizer.moments == "bf16":
        adamw = PairedAdamW(groups, lr=peak, betas=betas, eps=optimizer.eps)
    else:  # fused: one pass over memory, and no temporaries as long as the weights
        adamw = torch.optim.AdamW(groups, lr=peak, betas=betas, eps=optimizer.eps, fused=True)
    for group in adamw.param_groups:
        group["initial_lr"] = peak  # where a schedule starts from, which then scales it itself
        group["lr"] = peak * group.get("lr_scale", 1.0)
    return adamw


def build_schedule(
    optimizer: torch.optim.Optimizer,
    schedule: ScheduleConfig,
    steps_per_epoch: int,
    global_batch: int,
) -> CosineLRScheduler:
    """Linear warm-up, then cosine decay to min_lr at the last update; stepped per update."""
    scale = global_batch / REFERENCE_BATCH
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, schedule.epochs * steps_per_epoch - warmup),
        lr_min=schedule.min_lr * scale,
        warmup_t=warmup,
        warmup_lr_init=schedule.warmup_lr * scale,
        warmup_prefix=True,
        t_in_epochs=False,
    )
