"""Reading, decoding and transforming one sample, and stacking samples to a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from .bad_samples import Skipped
from .files import Source
from .rng import seeded
from .sampler import Draw
from .transforms import Transform


class Sample(NamedTuple):
    """Pixels [H, W, C] uint8 with their target; zeros and −1 for padding and unreadable samples.

    ``place`` is the sample's index in the split, −1 for padding.
    """

    pixels: np.ndarray
    target: Any
    place: int
    skipped: Skipped | None = None

    @property
    def valid(self) -> bool:
        return self.place >= 0 and self.skipped is None


class Batch(NamedTuple):
    """Samples of one micro-step on one rank.

    A loader yields the images as bytes: workers and the bus to the GPU carry four times as many per
    second as in float32. The task then prepares them for the model.

    Attributes:
        inputs: arguments of the model's forward by name. From a loader: ``images`` [B, C, H, W]
            uint8, channels-last in memory.
        targets: of the task, from a loader labels [B] int64.
        valid: [B] bool, False for padding and unreadable samples, which no metric may count.
        indices: [B] int64, places in the split, −1 for padding; they stay on the host.
        skipped: the samples that could not be read.
    """

    inputs: dict[str, Tensor]
    targets: Any
    valid: Tensor
    indices: Tensor
    skipped: list[Skipped]

    def to(self, device: torch.device) -> Batch:
        inputs, targets, valid = tree_map(
            lambda x: x.to(device, non_blocking=True), (self.inputs, self.targets, self.valid)
        )
        return self._replace(inputs=inputs, targets=targets, valid=valid)


class ImageDataset(Dataset[Sample]):
    """Samples by :class:`Draw`, augmented as a pure function of seed and draw.

    Args:
        source: encoded images.
        transform: from an encoded image to pixels of ``shape``.
        shape: (H, W, C).
        seed: of the augmentation.
    """

    def __init__(
        self, source: Source, transform: Transform, shape: tuple[int, int, int], seed: int
    ) -> None:
        self.source, self.transform = source, transform
        self.shape, self.seed = shape, seed

    def __getitem__(self, position: Draw) -> Sample:
        epoch, index, repeat = position
        if index < 0:
            return Sample(np.zeros(self.shape, np.uint8), -1, index)
        try:
            data = self.source.read(index)
            with seeded(self.seed, epoch, index, repeat):
                pixels = self.transform(data)
        except (OSError, ValueError) as error:
            skipped = Skipped.of(self.source.key(index), error)
            return Sample(np.zeros(self.shape, np.uint8), -1, index, skipped)
        return Sample(pixels, int(self.source.labels[index]), index)


def collate(samples: list[Sample]) -> Batch:
    """Stack images and labels."""
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    return Batch(
        {"images": pixels.permute(0, 3, 1, 2)},
        torch.tensor([sample.target for sample in samples]),
        torch.tensor([sample.valid for sample in samples]),
        torch.tensor([sample.place for sample in samples]),
        [sample.skipped for sample in samples if sample.skipped is not None],
    )


def collate_readable(collate: Callable[[list[Sample]], Batch], samples: list[Sample]) -> Batch:
    """Replace each unreadable sample by the batch's next readable one, and stack the samples.

    "Next" is cyclic. A batch without any readable sample stays unchanged.
    """
    skipped = [sample.skipped for sample in samples if sample.skipped is not None]
    if skipped and any(sample.valid for sample in samples):
        rows = [samples[i:] + samples[:i] for i in range(len(samples))]
        samples = [next(sample for sample in row if sample.valid) for row in rows]
    return collate(samples)._replace(skipped=skipped)
