"""One sample: read, decode, transform; and how samples become a batch."""

from __future__ import annotations

import io
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from .bad_samples import Skipped
from .rng import seeded
from .sampler import Position
from .source import Source
from .transforms import Transform

# Not all that Pillow reads: some of its formats start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")


class Sample(NamedTuple):
    """An image [C, H, W] with its label; zeros and −1 for padding and for unreadable samples.

    ``place`` is the sample's index in the split, −1 for padding.
    """

    image: Tensor
    label: int
    place: int
    skipped: Skipped | None = None


class Batch(NamedTuple):
    """Images [B, C, H, W] float32, labels [B] int64, and the samples that could not be read.

    In evaluation, label −1 marks padding and unreadable samples; no metric may count them.
    ``indices`` [B] int64 are the samples' places in the split, −1 for padding.
    """

    images: Tensor
    labels: Tensor
    skipped: list[Skipped]
    indices: Tensor


def decode(data: bytes, mode: str) -> Image.Image:
    """Decode the whole image and convert it to ``mode``.

    Raises:
        Exception: whatever Pillow raises on damaged or truncated data.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its message names an address in memory
        raise ValueError(f"not a {', '.join(FORMATS)} image") from None
    if image.mode[0] in "IF":  # Pillow would clip the pixels to 8 bits: a white image
        raise ValueError(f"pixels of mode {image.mode} have more than 8 bits")
    return image.convert(mode)


class ImageDataset(Dataset[Sample]):
    """Samples by ``(epoch, index)``, augmented as a pure function of seed, epoch and index.

    Args:
        source: encoded images.
        mode: Pillow's mode to decode to.
        transform: from such an image to a tensor of ``shape``.
        shape: [C, H, W].
    """

    def __init__(
        self,
        source: Source,
        mode: str,
        transform: Transform,
        shape: tuple[int, int, int],
        seed: int,
    ) -> None:
        self.source, self.mode, self.transform = source, mode, transform
        self.shape, self.seed = shape, seed

    def __getitem__(self, position: Position) -> Sample:
        epoch, index = position
        if index < 0:
            return Sample(torch.zeros(self.shape), -1, index)
        try:
            image = decode(self.source.read(index), self.mode)
        except Exception as error:  # on damaged data a decoder may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            skipped = Skipped(self.source.key(index), type(error).__name__, reason)
            return Sample(torch.zeros(self.shape), -1, index, skipped)
        with seeded(self.seed, epoch, index):
            return Sample(self.transform(image), int(self.source.labels[index]), index)


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
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
