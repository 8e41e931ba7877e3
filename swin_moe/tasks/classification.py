"""Classification: soft targets by mixup, CutMix and label smoothing; top-1 and top-5."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from ..common.text import shorten
from ..data.dataset import Batch
from ..distributed import Group, all_reduce_
from ..models import Outputs, SwinTransformer
from .base import Evaluation, Evaluator, Metric, StepResult, Task, whole_batch
from .mixing import Mixing, build_mixing

SHOWN = 0.05  # least share of a class in the caption of a mixed label


class Classification(Task):
    """Classification with soft targets [B, num_classes]; evaluation uses labels [B]."""

    metrics = (Metric("top1", "top-1", "%"), Metric("top5", "top-5", "%"),
               Metric("loss", "val loss", higher_is_better=False))  # fmt: skip

    @cached_property
    def mixing(self) -> Mixing:
        config = self.config
        return build_mixing(config.augment, config.model.num_classes, config.train.seed, self.rank)

    def check(self) -> None:
        if self.config.model.num_classes == 0:
            raise ValueError("model.num_classes=0: training needs at least one class")

    def build_model(
        self, expert_group: Group | None = None, *, initialise: bool = True
    ) -> SwinTransformer:
        config = self.config
        return SwinTransformer(config.model, config.moe, expert_group, initialise=initialise)

    def prepare(self, batch: Batch, step: int, training: bool) -> Batch:
        images, targets = self.normalise(batch.inputs["images"]), batch.targets
        if training:
            images, targets = self.mixing(images, targets, step)
        return batch._replace(inputs={"images": images}, targets=targets)

    def loss(self, outputs: Outputs, batch: Batch) -> StepResult:
        return StepResult(SoftTargetCrossEntropy()(outputs.predictions, batch.targets))

    def evaluator(self, device: torch.device) -> Evaluator:
        return Accuracy(self.config.model.num_classes, device, self.class_names)

    def example_batch(self, images: int, device: torch.device) -> Batch:
        classes = max(self.config.model.num_classes, 1)
        targets = torch.full((images, classes), 1 / classes, device=device)
        return whole_batch({"images": self.images(images, device)}, targets)

    def preview(self, batch: Batch) -> tuple[Tensor, list[str]]:
        pixels, _ = super().preview(batch)
        if batch.targets.is_floating_point():
            return pixels, [soft_label(target, self.class_names) for target in batch.targets]
        return pixels, [class_name(label, self.class_names) for label in batch.targets.tolist()]


class Accuracy(Evaluator):
    """Mean cross-entropy, top-1 and top-5, and top-1 per class.

    Args:
        names: names of the classes by label.
    """

    def __init__(
        self, num_classes: int, device: torch.device, names: Sequence[str] | None = None
    ) -> None:
        self.num_classes, self.names = num_classes, names
        self._correct = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._total = torch.zeros_like(self._correct)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, top-5 hits

    def update(self, outputs: Outputs, batch: Batch) -> None:
        logits = outputs.predictions.float()[batch.valid]
        labels = batch.targets[batch.valid]
        self._sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, self.num_classes), 1).indices
        hits = best == labels[:, None]
        self._sums[1] += hits.sum()
        self._correct.index_add_(0, labels, hits[:, 0].double())
        self._total.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))

    def compute(self) -> Evaluation:
        reduced = all_reduce_(torch.cat((self._correct, self._total, self._sums)))
        correct, total, sums = reduced.split([self.num_classes, self.num_classes, 2])
        images = float(total.sum())
        metrics = {
            "loss": float(sums[0]) / max(images, 1),
            "top1": 100.0 * float(correct.sum()) / max(images, 1),
            "top5": 100.0 * float(sums[1]) / max(images, 1),
        }
        rows = [
            {
                "class": self.names[label] if self.names else str(label),
                "images": f"{seen:.0f}",
                "top-1": f"{100 * right / seen:.1f} %",
            }
            for label, (right, seen) in enumerate(
                zip(correct.tolist(), total.tolist(), strict=True)
            )
            if seen
        ]
        return Evaluation(metrics, int(images), rows=rows)


def class_name(label: int, names: Sequence[str] | None) -> str:
    """Return the caption of a label; "" for padding and unreadable samples."""
    if label < 0:
        return ""
    return shorten(names[label]) if names else str(label)


def soft_label(target: Tensor, names: Sequence[str] | None) -> str:
    """Return a caption with the one or two strongest classes of a soft label [num_classes]."""
    weights, classes = target.topk(min(2, len(target)))
    first, *other = zip(weights.tolist(), classes.tolist(), strict=True)
    if not other or other[0][0] < max(SHOWN, 2 * float(target.min())):
        return class_name(first[1], names)
    return "\n".join(
        f"{weight:.2f} {class_name(label, names)}" for weight, label in (first, *other)
    )
