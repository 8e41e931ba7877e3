"""Accuracy and loss of a model on held-out data, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Loader
from ..distributed import all_reduce_
from ..models import MoEOutput, split_output


@dataclass(frozen=True)
class Evaluation:
    """Figures over all ranks; percentages in 0–100.

    Attributes:
        loss: mean cross-entropy. top1, top5: percentages.
        correct, total: [num_classes] images per class.
        unreadable: samples that could not be decoded and count nowhere.
    """

    loss: float
    top1: float
    top5: float
    correct: list[int]
    total: list[int]
    unreadable: int


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor | MoEOutput],
    loader: Loader,
    num_classes: int,
    device: torch.device,
) -> Evaluation:
    """Run ``forward`` over the loader's one epoch; every rank of the job must call it.

    Labels of −1 (padding, unreadable images) count nowhere.
    """
    correct = torch.zeros(num_classes, dtype=torch.float64, device=device)
    total = torch.zeros_like(correct)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, top-5 hits, unreadable
    for batch in loader.epoch(0):
        images, labels = loader.on_device(batch, device)
        logits, _ = split_output(forward(images))
        valid = labels >= 0
        logits, labels = logits.float()[valid], labels[valid]
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, num_classes), 1).indices
        hits = best == labels[:, None]
        sums[1] += hits.sum()
        sums[2] += len(batch.skipped)
        correct.index_add_(0, labels, hits[:, 0].double())
        total.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
    gathered = all_reduce_(torch.cat((correct, total, sums)))
    correct, total, sums = gathered.split([num_classes, num_classes, 3])
    images_seen = float(total.sum())
    if images_seen == 0:
        raise ValueError("evaluation saw no readable image: check data.path and data.val")
    return Evaluation(
        loss=float(sums[0]) / images_seen,
        top1=100.0 * float(correct.sum()) / images_seen,
        top5=100.0 * float(sums[1]) / images_seen,
        correct=[int(n) for n in correct.tolist()],
        total=[int(n) for n in total.tolist()],
        unreadable=int(sums[2]),
    )
