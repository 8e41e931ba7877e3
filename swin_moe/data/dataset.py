"""One sample: read, decode, transform; and how samples become a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .bad_samples import Skipped
from .decode import UnreadableImage
from .files import Source
from .rng import seeded
from .sampler import Draw
from .transforms import Transform


class Sample(NamedTuple):
    """Pixels [H, W, C] uint8 with their label; zeros and −1 for padding and unreadable samples.

    ``place`` is the sample's index in the split, −1 for padding.
    """

    pixels: np.ndarray
    label: int
    place: int
    skipped: Skipped | None = None


class Batch(NamedTuple):
    """Images [B, C, H, W] uint8, labels [B] int64, and the samples that could not be read.

    Bytes, because a worker hands over, and a GPU receives, four times as many images a second so;
    :meth:`Loader.on_device` makes of them what a model takes. Memory is channels-last.

    In evaluation, label −1 marks padding and unreadable samples; no metric may count them.
    ``indices`` [B] int64 are the samples' places in the split, −1 for padding.
    """

    images: Tensor
    labels: Tensor
    skipped: list[Skipped]
    indices: Tensor


class ImageDataset(Dataset[Sample]):
    """Samples by :data:`Draw`, augmented as a pure function of seed and position.

    Args:
        source: encoded images.
        transform: from such an image to pixels of ``shape``.
        shape: (H, W, C).
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
            kind = error.kind if isinstance(error, UnreadableImage) else "cannot be read"
            reason = (str(error).splitlines() or [""])[0]
            skipped = Skipped(self.source.key(index), kind, reason)
            return Sample(np.zeros(self.shape, np.uint8), -1, index, skipped)
        return Sample(pixels, int(self.source.labels[index]), index)


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch."""
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    return Batch(
        pixels.permute(0, 3, 1, 2),
        torch.tensor([sample.label for sample in samples]),
        [sample.skipped for sample in samples if sample.skipped is not None],
        torch.tensor([sample.place for sample in samples]),
    )


def replace_unreadable(batch: Batch) -> Batch:
    """Put the next readable sample, cyclically, in each unreadable one's place, with its label."""
    size = len(batch.labels)
    good = (batch.labels >= 0).tolist()
    chosen = [next(j % size for j in range(i, i + size) if good[j % size]) for i in range(size)]
    images, labels, indices = (t[chosen] for t in (batch.images, batch.labels, batch.indices))
    return Batch(images, labels, batch.skipped, indices)
