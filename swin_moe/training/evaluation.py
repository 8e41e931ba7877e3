"""Evaluation of a model on held-out data, on any number of processes."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data import DeviceBatches, Loader
from ..distributed import all_reduce_
from ..tasks import Evaluation, Task
from ..tasks.base import Forward


@torch.no_grad()
def evaluate(task: Task, forward: Forward, loader: Loader, device: torch.device) -> Evaluation:
    """Evaluate ``forward`` on one epoch of the loader; every rank must call it.

    Raises:
        ValueError: no sample on any rank is readable.
    """
    evaluator = task.evaluator(device)
    unreadable = torch.zeros((), dtype=torch.float64, device=device)
    batches = DeviceBatches(loader, device, 0)
    for step, batch in enumerate(batches):
        unreadable += len(batch.skipped)
        prepared = task.prepare(batch, step, training=False)
        evaluator.update(forward(prepared.inputs), prepared)
        batches.look_ahead()
    found = evaluator.compute()
    if found.samples == 0:
        raise ValueError("evaluation saw no readable image: check data.path and data.val")
    return replace(found, unreadable=int(all_reduce_(unreadable)))
