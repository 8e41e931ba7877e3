"""Metrics of a model on held-out data, on any number of processes."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data import Loader
from ..distributed import all_reduce_
from ..tasks import Evaluation, Task
from ..tasks.base import Forward


@torch.no_grad()
def evaluate(task: Task, forward: Forward, loader: Loader, device: torch.device) -> Evaluation:
    """Run ``forward`` over the loader's one epoch; every rank of the job must call it.

    Raises:
        ValueError: no sample of any rank is readable.
    """
    evaluator = task.evaluator(device)
    unreadable = torch.zeros((), dtype=torch.float64, device=device)
    for step, batch in enumerate(loader.epoch(0)):
        unreadable += len(batch.skipped)
        prepared = task.prepare(batch.to(device), step, training=False)
        evaluator.update(forward(prepared.inputs), prepared)
    found = evaluator.compute()
    if found.samples == 0:
        raise ValueError("evaluation saw no readable image: check data.path and data.val")
    return replace(found, unreadable=int(all_reduce_(unreadable)))
