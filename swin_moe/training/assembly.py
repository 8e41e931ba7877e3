"""Build model and engine of a run from its config, with the weights of a checkpoint or a file."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .. import checkpoint
from ..config import Config, ZeroConfig
from ..distributed import World
from ..models.build import stage_of
from ..models.sharded_init import build_in_parts
from ..moe import MoELayer, choose_overlap, moe_layers
from ..tasks import Task
from ..weights.pretrained import Pretrained, as_it_is, load_pretrained
from .checkpointer import expert_layout
from .engine import Engine, cutter, largest_parameter
from .precision import resolve_precision
from .run_directory import Run


def build_engine(
    task: Task, world: World, reader: checkpoint.Reader | None, source: Pretrained | None
) -> tuple[Engine, str]:
    """Build model and engine.

    Args:
        reader: the checkpoint whose weights the model gets; masters and moments are loaded later.
        source: pretrained weights, if there is no checkpoint.

    Returns:
        the engine, and a text on the pretrained weights, "" without them.
    """
    config = task.config
    if config.zero.stage == 3 and source is None:
        model = _build_in_parts(task, world, reader)
    else:
        model = task.build_model(world.expert)
        if reader is not None:
            checkpoint.load_weights(model, reader, expert_layout(model, world))
    by_name = task.class_names if config.data.match_classes == "name" else None
    loaded = load_pretrained(task.backbone(model), source, by_name) if source else ""
    exact = as_it_is(model) if source else None
    engine = Engine(
        model,
        world,
        optimizer=config.optimizer,
        zero=_own_files(config),
        dtype=resolve_precision(config.precision, world.device),
        micro_batch=config.data.batch_size,
        gradient_accumulation_steps=config.train.micro_steps,
    )
    if exact is not None:
        engine.load(exact, updates=0)
    return engine, loaded


def _build_in_parts(task: Task, world: World, reader: checkpoint.Reader | None) -> nn.Module:
    """Build the model for ZeRO-3, cut module by module, so that it is never whole on any rank."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        outline = task.build_model(world.expert)
    layout = expert_layout(outline, world)

    def fill(name: str, parameter: nn.Parameter) -> None:
        if reader is not None:
            checkpoint.load_weight(name, parameter, reader, layout)

    config = task.config
    dtype = resolve_precision(config.precision, world.device)
    cut = cutter(_own_files(config), world, dtype, largest_parameter(outline))
    build = partial(task.build_model, world.expert, initialise=False)
    model = build_in_parts(build, cut, fill)
    if reader is not None:
        checkpoint.load_buffers(model, reader, layout)
    return model


def _own_files(config: Config) -> ZeroConfig:
    """Give ZeRO's files a folder of this run, the same at each start."""
    if not config.zero.uses_files:
        return config.zero
    folder = Path(config.train.output).resolve()
    name = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    return config.zero.model_copy(update={"nvme_path": str(Path(config.zero.nvme_path) / name)})


def tune_overlap(run: Run, config: Config, engine: Engine) -> None:
    """Measure ``moe.overlap_degree=auto`` for the MoE layers of each stage."""
    if config.moe.overlap_degree != "auto" or run.world.expert.size == 1:
        return
    height, width = config.model.token_grid
    stages: dict[int, list[MoELayer]] = {}
    for name, layer in moe_layers(engine.model).items():
        stages.setdefault(stage_of(name), []).append(layer)
    for stage, layers in stages.items():
        shape = (config.data.batch_size, -(-height // 2**stage), -(-width // 2**stage))
        line = choose_overlap(layers, shape, run.world.device, engine.dtype)
        run.say(f"stage {stage}: {line}")
