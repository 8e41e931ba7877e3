"""The tasks: a file for each, and their common interface.

``base.py`` has the interface: a task builds the model, prepares batches, computes the loss and
evaluates. The rest of the program uses only this interface; ``config/tasks.py`` has the sections of
``task:``.
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
    """Build the task of ``config.task.name``.

    Args:
        rank: rank of this process, on which random draws depend.
    """
    return TASKS[config.task.name](config, rank)
