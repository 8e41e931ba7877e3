"""A run's inputs, checked before anything is written: data, plan and pretrained weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from .. import checkpoint
from ..common.writing import Appender
from ..config import Config, load_config
from ..data import Loader, loader_of
from ..weights.pretrained import Pretrained, adopt_pretrained_window, read_pretrained
from .run_directory import Run
from .trainer import TrainingPlan


@dataclass(frozen=True)
class Inputs:
    """A run's inputs from the user's files.

    Attributes:
        classes: names by label, where the data has any. loaders: training and held-out data.
        source: weights of ``model.pretrained``, None where a checkpoint of the run goes on instead.
    """

    classes: list[str] | None
    loaders: list[Loader]
    plan: TrainingPlan
    source: Pretrained | None


def open_inputs(run: Run, config: Config, fresh: bool) -> Inputs:
    """Open data and weights, or raise ``ValueError`` with one line."""
    classes, loaders = _open_data(run, config, fresh)
    return Inputs(
        classes, loaders, _plan(config, loaders[0]), _starting_weights(run, config, fresh)
    )


def list_bad_samples(run: Run, loaders: list[Loader]) -> None:
    """Let each loader list what it cannot read in the run's logs."""
    for loader in loaders:
        name = f"bad-samples-rank-{run.world.rank}.jsonl"
        loader.bad.file = Appender(run.log_file.with_name(name))


def _open_data(run: Run, config: Config, fresh: bool) -> tuple[list[str] | None, list[Loader]]:
    """Names of the model's classes, and the training and held-out data with labels to fit them.

    The names are those of the checkpoint that the run will resume, else of the training data.
    """
    ranks_of = run.world.rank, run.world.size
    known = None if fresh else checkpoint.known_classes(run.checkpoints)
    train = loader_of(config, True, *ranks_of, known)
    known = known or train.class_names
    loaders = [train, loader_of(config, False, *ranks_of, known)]
    for loader in loaders:
        loader.check_room()
    return known, loaders


def _starting_weights(run: Run, config: Config, fresh: bool) -> Pretrained | None:
    """Weights of ``model.pretrained``; none where a checkpoint of the run goes on instead.

    Sets ``model.pretrained_window_sizes`` to the file's windows where the config leaves them open,
    and keeps that choice when the run is resumed.
    """
    if not config.model.pretrained:
        return None
    checkpoints = [] if fresh else checkpoint.list_checkpoints(run.checkpoints)
    for path in checkpoints:
        with contextlib.suppress(ValueError):  # a damaged one is passed over, and said, later
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
        num_classes=config.model.num_classes,
        max_bad_share=config.data.max_bad_share,
    )
