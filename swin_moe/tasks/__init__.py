"""What is learned: a file for each task, and the contract that they share.

``base.py`` has the contract: a task builds the model, prepares batches, and knows loss and metrics.
Trainer, evaluation, automatic batch, planner and pictures call it and never name a task. The
sections of ``task:`` are in ``config/tasks.py``.
"""

from ..config import Config
from .base import Evaluation, Evaluator, Metric, StepResult, Task
from .classification import Classification
from .simmim import MaskedImageModelling

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "simmim": MaskedImageModelling,
}

__all__ = ["TASKS", "Evaluation", "Evaluator", "Metric", "StepResult", "Task", "build_task"]


def build_task(config: Config, rank: int = 0) -> Task:
    """The task of ``config.task.name``.

    Args:
        rank: of this process; what a task draws at random depends on it.
    """
    return TASKS[config.task.name](config, rank)
