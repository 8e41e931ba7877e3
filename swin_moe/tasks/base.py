"""The contract of a task. Everything that trains or evaluates runs these steps:

batch = task.prepare(batch, step, training)
outputs = forward(batch.inputs)
result = task.loss(outputs, batch)          # in training; Task.step does both
evaluator.update(outputs, batch)            # in evaluation
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config
from ..data.dataset import Batch, Sample, collate
from ..data.normalise import Normalise
from ..distributed import Group
from ..models import Outputs, SwinTransformer

Forward = Callable[[dict[str, Tensor]], Outputs]


class Metric(NamedTuple):
    """A figure of an evaluation, as people read it.

    Attributes:
        key: ``val/<key>`` in the log.
        unit: ``%`` for percentages in 0–100, otherwise empty.
    """

    key: str
    label: str
    unit: str = ""
    higher_is_better: bool = True

    def format(self, value: float) -> str:
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.4f}"

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value beats the best one so far; None = there is none."""
        return best is None or (value > best if self.higher_is_better else value < best)


class StepResult(NamedTuple):
    """A forward pass with its loss.

    Attributes:
        loss: scalar of the task, without the balance losses of MoE layers.
        scalars: further scalars on the device, logged as ``train/<key>``.
    """

    loss: Tensor
    scalars: dict[str, Tensor] = {}  # noqa: RUF012 - nobody changes it


@dataclass(frozen=True)
class Evaluation:
    """Figures of held-out data over all ranks.

    Attributes:
        metrics: by :attr:`Metric.key`, in the order in which they are logged.
        samples: how many were counted.
        unreadable: samples that could not be decoded and count nowhere.
        rows: of a table to print, such as one row per class.
    """

    metrics: dict[str, float]
    samples: int
    unreadable: int = 0
    rows: list[dict[str, str]] = field(default_factory=list)


class Evaluator(ABC):
    """Adds up what a model predicts."""

    @abstractmethod
    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Take in a batch; samples that are not ``batch.valid`` must count nowhere."""

    @abstractmethod
    def compute(self) -> Evaluation:
        """Return the figures of all ranks, each of which must call it."""


class Task(ABC):
    """What is learned. It is no module: everything that is trained is in its model.

    Args:
        config: of the run; a task reads its own section, and what its model and samples need.
        rank: of this process.

    Attributes:
        metrics: of an evaluation; the first one decides which checkpoint is the best.
        class_names: by label, where the data has any; set once they are known.
    """

    metrics: ClassVar[tuple[Metric, ...]]

    def __init__(self, config: Config, rank: int = 0) -> None:
        self.config, self.rank = config, rank
        self.class_names: list[str] | None = None
        self.normalise = Normalise(config.data.mean, config.data.std)

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    def check(self) -> None:  # noqa: B027 - most tasks can use any config
        """Raise ``ValueError``, one line that names the key, for what no start can use."""

    @abstractmethod
    def build_model(
        self, expert_group: Group | None = None, *, initialise: bool = True
    ) -> nn.Module:
        """The model, with everything that is trained in it; its forward returns ``Outputs``.

        Args:
            initialise: draw the weights; otherwise the caller calls its ``init_weights``.
        """

    def backbone(self, model: nn.Module) -> SwinTransformer:
        """The part of the model that pretrained weights are for."""
        assert isinstance(model, SwinTransformer)
        return model

    def collate(self, samples: list[Sample]) -> Batch:
        """Stack samples, in a worker process."""
        return collate(samples)

    @abstractmethod
    def prepare(self, batch: Batch, step: int, training: bool) -> Batch:
        """Make of a loader's batch, on the device, what model and loss take.

        What is drawn must depend on the seed, ``rank`` and ``step`` alone, or in evaluation on
        ``batch.indices``.

        Args:
            step: of the micro-steps from the start of the training.
        """

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> StepResult:
        """The loss of a prepared batch."""

    @abstractmethod
    def evaluator(self, device: torch.device) -> Evaluator:
        """Start an evaluation."""

    @abstractmethod
    def example_batch(self, images: int, device: torch.device) -> Batch:
        """A prepared batch without data: for trials of memory, plans and benchmarks."""

    def preview(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """What a person should see of a prepared batch.

        Returns:
            pixels [B, H, W, C] in 0–1 on the host, and a caption for each, which may be empty.
        """
        images = batch.inputs["images"].permute(0, 2, 3, 1).cpu()
        data = self.config.data
        pixels = (images * torch.tensor(data.std) + torch.tensor(data.mean)).clamp(0, 1)
        return pixels, [""] * len(pixels)

    def step(self, forward: Forward, batch: Batch) -> tuple[Outputs, StepResult, Tensor]:
        """Forward and loss of a prepared batch.

        Returns:
            outputs, the task's result, and the scalar to call ``backward`` on: the loss with the
            balance losses of MoE layers.
        """
        outputs = forward(batch.inputs)
        result = self.loss(outputs, batch)
        aux_loss = outputs.aux_loss
        return outputs, result, result.loss if aux_loss is None else result.loss + aux_loss

    def images(self, count: int, device: torch.device) -> Tensor:
        """Random images [count, C, H, W] of the model's size."""
        model = self.config.model
        return torch.randn(count, model.in_chans, *model.image_sides, device=device)


def whole_batch(inputs: dict[str, Tensor], targets: Any) -> Batch:
    """A batch of valid samples that are in no data set."""
    count = len(inputs["images"])
    valid = torch.ones(count, dtype=torch.bool, device=inputs["images"].device)
    return Batch(inputs, targets, valid, torch.full((count,), -1), [])
