"""The plan of a training, and its position in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Position:
    """The progress of a training.

    ``step`` never falls. ``epoch`` and ``update`` are the place in the schedule, which a resume
    with another global batch converts.

    Attributes:
        step: updates so far, those that were not made included.
        update: updates within the epoch.
        best: best value of the task's metric.
        unreadable: unreadable training samples so far.
        unreadable_before: those of earlier epochs.
        skipped: skipped updates so far.
        overflows: updates that were not made because the loss scale of fp16 was too large.
    """

    step: int = 0
    epoch: int = 0
    update: int = 0
    best: float | None = None
    best_step: int = -1
    unreadable: int = 0
    unreadable_before: int = 0
    skipped: int = 0
    overflows: int = 0

    @property
    def made(self) -> int:
        """Updates that were made."""
        return self.step - self.skipped - self.overflows

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """Return the position of a :meth:`state`, also of earlier versions."""
        state = dict(state)
        top1 = state.pop("best_top1", -1.0)
        return cls(**{"best": top1 if top1 >= 0 else None, **state})


@dataclass
class TrainingPlan:
    """The length of a training and the intervals of its actions, in updates and epochs."""

    epochs: int
    updates_per_epoch: int
    gradient_accumulation_steps: int
    eval_every_epochs: int
    save_every_epochs: int
    save_every_steps: int
    log_every_steps: int
    max_steps: int
    max_bad_share: float

    def is_done(self, position: Position) -> bool:
        return bool(self.limit(position))

    def limit(self, position: Position) -> str:
        """Return the key that ends training at this position, "" if none does."""
        if position.epoch >= self.epochs:
            return "schedule.epochs"
        return "train.max_steps" if 0 < self.max_steps <= position.step else ""
