"""Parameter groups, the optimizer and its schedule, by the Swin recipes."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from .config import OptimizerConfig, ScheduleConfig
from .models import expert_parameter_names

# Names, or parts of them, that are never decayed; so are 1-D tensors and biases.
NO_DECAY = (
    "absolute_pos_embed",
    "cpb_mlp",
    "logit_scale",
    "relative_position_bias_table",
    "temperature",
    "cosine_projector",
    "sim_matrix",
)
REFERENCE_BATCH = 512  # images per update for which base_lr, warmup_lr and min_lr are meant


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: the official rule, stacked expert biases included."""
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    return not any(part in name for part in NO_DECAY)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Up to four groups: dense and expert parameters, decayed and not.

    Expert groups carry ``moe: True``. A group's order of parameters is the model's.
    """
    experts = expert_parameter_names(model)
    groups: list[dict[str, Any]] = []
    for moe in (False, True):
        for decay in (True, False):
            chosen = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and (name in experts) == moe
                and decays(name, parameter) == decay
            ]
            if chosen:
                rate = weight_decay if decay else 0.0
                groups.append({"params": chosen, "weight_decay": rate, "moe": moe})
    return groups


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: OptimizerConfig, global_batch: int
) -> torch.optim.AdamW:
    """AdamW at the peak rate base_lr × global batch / 512."""
    return torch.optim.AdamW(
        groups,
        lr=optimizer.base_lr * global_batch / REFERENCE_BATCH,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
    )


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
