"""A run's inputs, checked before anything is written: data, plan and pretrained weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from .. import checkpoint
from ..common.writing import Appender
from ..config import Config, load_config
from ..data import Loader, loader_of
from ..tasks import Task
from ..weights.pretrained import Pretrained, adopt_pretrained_window, read_pretrained
from .progress import TrainingPlan
from .run_directory import Run


@dataclass(frozen=True)
class Inputs:
    """A run's inputs from the user's files.

    Attributes:
        loaders: training and held-out data.
        source: weights of ``model.pretrained``; None if there are none, or a checkpoint is resumed.
    """

    loaders: list[Loader]
    plan: TrainingPlan
    source: Pretrained | None


def open_inputs(run: Run, task: Task, fresh: bool) -> Inputs:
    """Open data and weights and set ``task.class_names``.

    Raises:
        ValueError: one line for the user.
    """
    config = task.config
    loaders = _open_data(run, task, fresh)
    return Inputs(loaders, _plan(config, loaders[0]), _starting_weights(run, config, fresh))


def list_bad_samples(run: Run, loaders: list[Loader]) -> None:
    """Make each loader list unreadable samples in the run's logs."""
    for loader in loaders:
        name = f"bad-samples-rank-{run.world.rank}.jsonl"
        loader.bad.file = Appender(run.log_file.with_name(name))


def _open_data(run: Run, task: Task, fresh: bool) -> list[Loader]:
    """Open training and held-out data, with labels of the model's classes.

    Class names are those of the checkpoint to resume, otherwise those of the training data.
    """
    config, world = task.config, run.world
    known = None if fresh else checkpoint.known_classes(run.checkpoints)
    train = loader_of(config, True, world.rank, world.size, known, task.collate)
    known = known or train.class_names
    val = loader_of(config, False, world.rank, world.size, known, task.collate)
    for loader in (train, val):
        loader.check_room()
    task.class_names = known
    return [train, val]


def _starting_weights(run: Run, config: Config, fresh: bool) -> Pretrained | None:
    """Read the weights of ``model.pretrained``, unless a checkpoint of the run will be resumed.

    Sets ``model.pretrained_window_sizes`` to the file's windows if the config does not state them;
    a resumed run keeps them.
    """
    if not config.model.pretrained:
        return None
    checkpoints = [] if fresh else checkpoint.list_checkpoints(run.checkpoints)
    for path in checkpoints:
        with contextlib.suppress(ValueError):  # the resume reports and skips damaged ones
            saved = load_config(path / "config.yaml").model.pretrained_window_sizes
            stated = config.model.pretrained_window_sizes
            config.model.pretrained_window_sizes = stated or saved
            return None
    if checkpoints:
        return None
    source = read_pretrained(Path(config.model.pretrained))
    config.model = adopt_pretrained_window(config.model, source)
    return source


def _plan(config: Config, loader: Loader) -> TrainingPlan:
    accumulation = config.train.micro_steps
    updates = len(loader) // accumulation
    if updates == 0:
        if total := config.data.global_batch:
            raise ValueError(
                f"data.global_batch={total} is more than the images of an epoch, which make "
                f"{len(loader)} of the {accumulation} batches of an update: lower it"
            )
        raise ValueError(
            f"train.gradient_accumulation_steps={accumulation} is more than the {len(loader)} "
            "batches of an epoch: lower it or data.batch_size"
        )
    return TrainingPlan(
        epochs=config.schedule.epochs,
        updates_per_epoch=updates,
        gradient_accumulation_steps=accumulation,
        eval_every_epochs=config.train.eval_every_epochs,
        save_every_epochs=config.checkpoint.every_epochs,
        save_every_steps=config.checkpoint.every_steps,
        log_every_steps=config.log.every_steps,
        max_steps=config.train.max_steps,
        max_bad_share=config.data.max_bad_share,
    )
