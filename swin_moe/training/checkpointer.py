"""Save and restore the state of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint import Saved, Writer
from ..config import Config, dump_config
from ..data import Loader
from ..distributed import World
from ..distributed.expert_placement import ExpertLayout, expert_share
from ..distributed.watchdog import Writing
from ..models import expert_parameter_names
from ..moe import num_experts
from ..tasks import Task
from .changes import data_facts
from .engine import Engine
from .progress import Position, TrainingPlan
from .run_directory import Run

log = logging.getLogger("swin_moe")


def expert_layout(model: nn.Module, world: World) -> ExpertLayout:
    """Return this rank's part of the model's experts."""
    experts = num_experts(model)
    share = expert_share(experts, world.expert.rank, world.expert.size)
    return ExpertLayout(expert_parameter_names(model), experts, share)


def global_batch(config: Config, world: World) -> int:
    """Return the number of images per update."""
    return config.data.batch_size * config.train.micro_steps * world.size


@dataclass
class Checkpointer:
    """The checkpoints of a run, with position, weights and moments.

    Attributes:
        writing: progress of a write, for the watchdog.
        writer: writes checkpoints in the background.
    """

    run: Run
    task: Task
    plan: TrainingPlan
    train_loader: Loader
    writing: Writing
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        report = partial(_report_save, self.run)
        self.writer = Writer(self.run.checkpoints, self.run.world, report, self.writing)

    def save(self, engine: Engine, position: Position) -> None:
        """Begin to write a checkpoint; every rank must call it."""
        config, world = self.task.config, self.run.world
        folder = str(Path(config.data.path).resolve())
        state = {
            "position": position.state(),
            "metric": self.task.metric._asdict(),
            "global_batch": global_batch(config, world),
            "updates_per_epoch": self.plan.updates_per_epoch,
            "processes": world.size,
            "expert_parallel_size": world.expert.size,
            "zero_stage": config.zero.stage,
            "data": data_facts(self.train_loader) | {"folder": folder},
        }
        if engine.loss_scale:
            state["loss_scale"] = engine.loss_scale.state()
        self.writer.save(
            position.step,
            engine.fragments(),
            expert_layout(engine.model, world),
            state=state,
            config_text=dump_config(config),
            class_names=self.task.class_names,
            keep_last=config.checkpoint.keep_last,
            best_step=position.best_step,
            size=engine.saved_bytes,
        )

    def restore(
        self, reader: checkpoint.Reader, engine: Engine, place: Position | None
    ) -> Position:
        """Load masters and moments into the engine.

        Args:
            place: the position at a roll-back, which keeps its place in the data.

        Returns:
            the position from which to train on.
        """
        saved = Position.of(reader.state["position"])
        if place is None:
            batch = global_batch(self.task.config, self.run.world)
            position = _converted(saved, reader.state, batch, self.plan)
        else:
            lost = place.step - saved.made - saved.overflows
            position = replace(place, skipped=lost, overflows=saved.overflows)
        layout = expert_layout(engine.model, self.run.world)

        def read(name: str, kind: str, start: int, stop: int) -> Tensor:
            return reader.values(name, kind, layout.share_of(name), start, stop)

        engine.load(read, updates=saved.made)
        if engine.loss_scale and (scale := reader.state.get("loss_scale")):
            engine.loss_scale.load(scale)
        return position


def _converted(
    position: Position, state: dict[str, Any], batch: int, plan: TrainingPlan
) -> Position:
    """Keep the share of the epoch if the global batch or the number of samples has changed.

    Args:
        state: the checkpoint's ``state.json``.
        batch: the global batch now.
    """
    former, updates = state["global_batch"], plan.updates_per_epoch
    length = state.get("updates_per_epoch", updates * batch // former)  # older ones lack it
    if former != batch:
        update = min(position.update * former // batch, updates - 1)
        cause = f"the global batch was {former} and is {batch}: rates follow it, and"
    elif length != updates or position.update >= updates:
        update = min(position.update * updates // length, updates - 1)
        cause = f"an epoch had {length:,} updates and has {updates:,}, since the data have changed:"
    else:
        return position
    log.warning("%s epoch %d goes on at update %d", cause, position.epoch + 1, update)
    return replace(position, update=update)


def _report_save(run: Run, saved: Saved) -> None:
    if saved.error:
        run.say(
            f"warning: the checkpoint of step {saved.step} could not be written: {saved.error}; "
            "earlier ones are unchanged, and training goes on"
        )
    else:
        log.info(
            "checkpoint of step %d: %.1f MB in %.2f s, of which training waited %.3f s",
            saved.step,
            saved.bytes / 1e6,
            saved.seconds,
            saved.stall,
        )
