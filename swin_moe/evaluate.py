"""Evaluate a checkpoint, with its model and held-out data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from . import checkpoint
from .common.reading import read_json
from .config import Config, ConfigError, load_config
from .data import Loader, loader_of
from .distributed import World
from .reporting import tables
from .tasks import Evaluation, Task, build_task
from .tasks.base import Forward
from .training.evaluation import evaluate
from .training.precision import in_precision, resolve_precision, set_numerics
from .weights.pretrained import adopt_pretrained_window, load_pretrained, read_pretrained

log = logging.getLogger("swin_moe")


@dataclass(frozen=True)
class Opened:
    """A checkpoint with its task, model and held-out data; ``forward`` calls the model."""

    path: Path
    task: Task
    model: nn.Module
    forward: Forward
    loader: Loader


def open_checkpoint(path: Path, world: World, overrides: list[str], command: str) -> Opened:
    """Open a checkpoint, or the last one of a run directory, with its held-out data.

    Args:
        command: name of the command, for messages.

    Raises:
        ValueError: no checkpoint can be evaluated, or there are several processes.
    """
    if world.size > 1:
        raise ValueError(f"{command} runs as one process: start it without a launcher")
    return checkpoint.read_newest(path, partial(_open, world=world, overrides=overrides))


def _open(found: Path, world: World, overrides: list[str]) -> Opened:
    class_names = checkpoint.class_names(found)  # first: fails if the folder is gone
    source = read_pretrained(found)
    config = load_config(found / "config.yaml", overrides)
    if not any(override.startswith("data.path=") for override in overrides):
        _find_data(config, found)
    set_numerics(config, world.device)
    trained = load_config(found / "config.yaml").task.name
    if config.task.name != trained:
        raise ConfigError(
            f"task.name={config.task.name}, but {found} was trained with {trained}: leave it out"
        )
    if config.model.num_classes != source.config.model.num_classes:
        raise ConfigError(
            f"model.num_classes={config.model.num_classes}, but {found} was trained for "
            f"{source.config.model.num_classes}: its head cannot be evaluated"
        )
    task = build_task(config)
    task.check()
    config.model = adopt_pretrained_window(config.model, source)
    with torch.random.fork_rng(devices=[]):
        model = task.build_model()
    load_pretrained(task.backbone(model), source)
    _load_the_rest(model, task.backbone(model), found)
    model.eval().to(world.device)
    dtype = resolve_precision(config.precision, world.device)
    forward = in_precision(model, dtype, cast_weights=config.zero.stage > 0)
    loader = loader_of(config, training=False, classes=class_names, collate=task.collate)
    loader.check_room()
    task.class_names = loader.class_names
    return Opened(found, task, model, forward, loader)


def _load_the_rest(model: nn.Module, backbone: nn.Module, path: Path) -> None:
    """Load the parameters that the task adds to the backbone, such as a decoder."""
    inside = {id(parameter) for parameter in backbone.parameters()}
    reader = checkpoint.Reader(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) not in inside or name.endswith("mask_token"):
                parameter.copy_(reader.tensor(name))


def _find_data(config: Config, path: Path) -> None:
    """Resolve a relative ``data.path`` as in training, if the working directory lacks it."""
    here = Path(config.data.path)
    state = read_json(path / "state.json")
    there = state.get("data", {}).get("folder") if isinstance(state, dict) else None
    if here.is_absolute() or here.exists() or there is None or not Path(there).exists():
        return
    if Path(there).name == here.name:
        config.data.path = there
        log.warning("data.path=%s is not here: taken from %s, as in training", here, there)


def evaluate_checkpoint(
    path: Path, world: World, console: Console, overrides: list[str]
) -> Evaluation:
    """Evaluate a checkpoint on one process, see :func:`open_checkpoint`."""
    opened = open_checkpoint(path, world, overrides, "evaluate")
    result = evaluate(opened.task, opened.forward, opened.loader, world.device)
    tables.print_evaluation(console, opened.path.resolve(), result, opened.task.metrics)
    opened.loader.close()
    return result
