"""Pictures of what a model is shown: augmented and mixed images with their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from torch import Tensor

from ...common.drawing import check_picture, font_file, write_png
from ...common.text import plain, shorten
from ...config import Config
from ..loader import Loader, loader_of
from ..mixing import build_mixing

LOOKED_AT = 1000  # held-out samples, for some of several classes
COLUMNS, ROWS = 8, 4  # of training images; below them comes a row of held-out ones
TILE, GAP, LABEL, TITLE = 142, 8, 40, 34  # pixels: of an image, between, of two lines, on top
TOLD = 0.05  # share from which on a class of a mixed label is named


def show(config: Config, output: Path, console: Console) -> None:
    """Draw the first images of the first epoch, as the first of all processes will see them.

    Raises:
        ValueError: one line, for a config or data that cannot be used.
    """
    check_picture(output)
    train = loader_of(config, True)
    loaders = [train, loader_of(config, False, classes=train.class_names)]
    for loader in loaders:
        console.print(plain(loader.description), highlight=False, markup=False, soft_wrap=True)
    contact_sheet(config, loaders[0], loaders[1], output)
    for loader in loaders:
        loader.close()
    console.print(f"the picture is {plain(output)}", highlight=False, markup=False, soft_wrap=True)


def contact_sheet(config: Config, train: Loader, val: Loader, path: Path) -> None:
    """A PNG of the batches that training begins with, and of the first held-out images.

    Both are read in this process alone, and nothing that training draws is changed by it.
    """
    mixing = build_mixing(config.augment, config.model.num_classes, config.train.seed)
    cells: list[tuple[np.ndarray, str]] = []
    wanted = COLUMNS * ROWS
    for step, batch in enumerate(train.peek(-(-wanted // config.data.batch_size))):
        images, labels = train.on_device(batch, torch.device("cpu"))
        images, targets = mixing(images, labels, step)
        pixels = _pixels(images, config.data.mean, config.data.std)
        cells += [
            (image, _told(target, train.class_names))
            for image, target in zip(pixels, targets, strict=True)
        ]
    held_out: list[tuple[np.ndarray, str]] = []
    batch = val.pick(_of_several_classes(val))
    held_out += [
        (image, _name(label, val.class_names))
        for image, label in zip(
            batch.images.permute(0, 2, 3, 1).numpy() / 255, batch.labels.tolist(), strict=True
        )
        if label >= 0
    ]
    _draw(cells[:wanted], held_out[:COLUMNS], path)


def _of_several_classes(loader: Loader) -> list[int]:
    """Indices of held-out images for a row, from as many classes as evenly spread samples have.

    The first of each class come first, then the second of each.
    """
    looked_at = min(loader.num_samples, LOOKED_AT)
    seen: Counter[int] = Counter()
    order = []
    for place in range(looked_at):
        index = place * loader.num_samples // looked_at
        label = loader.label(index)
        order.append((seen[label], index))
        seen[label] += 1
    return [index for _, index in sorted(order)[:COLUMNS]]


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised [B, C, H, W] to [B, H, W, C] in 0..1; erased rectangles are noise beyond it."""
    pixels = images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    return pixels.clamp(0, 1).numpy()


def _told(target: Tensor, names: Sequence[str] | None) -> str:
    """The classes of a soft label, the strongest first."""
    weights, classes = target.topk(min(2, len(target)))
    first, *other = zip(weights.tolist(), classes.tolist(), strict=True)
    if not other or other[0][0] < max(TOLD, 2 * float(target.min())):
        return _name(first[1], names)
    return "\n".join(f"{weight:.2f} {_name(label, names)}" for weight, label in (first, *other))


def _name(label: int, names: Sequence[str] | None) -> str:
    return shorten(names[label]) if names else str(label)


def _draw(
    training: list[tuple[np.ndarray, str]], held_out: list[tuple[np.ndarray, str]], path: Path
) -> None:
    """Tiles with their labels; pixels [H, W, C] are in 0..1."""
    rows = [training[i : i + COLUMNS] for i in range(0, len(training), COLUMNS)] + [held_out]
    step = TILE + GAP, TILE + LABEL
    sheet = Image.new("RGB", (COLUMNS * step[0] + GAP, len(rows) * step[1] + TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    own, other = font_file(""), font_file("".join(label for row in rows for _, label in row))
    title = "training, augmented and mixed; last row: held out"
    pen.text((sheet.width / 2, TITLE / 2), title, "black", _font(18, own), anchor="mm")
    for row, cells in enumerate(rows):
        for column, (pixels, label) in enumerate(cells):
            left, top = GAP + column * step[0], TITLE + row * step[1]
            # The label stands above its image: its last line touches it.
            middle, above = left + TILE / 2, top + LABEL - 4
            lines = label.count("\n")
            font = _font(12, own if label.isascii() else other)
            pen.multiline_text(
                (middle, above - lines * 15), label, "black", font, "ms", 3, "center"
            )
            sheet.paste(_tile(pixels), (left, top + LABEL))
    write_png(path, partial(sheet.save, format="PNG"))


def _tile(pixels: np.ndarray) -> Image.Image:
    levels = (np.broadcast_to(pixels, (*pixels.shape[:2], 3)) * 255).round().astype(np.uint8)
    height, width = levels.shape[:2]
    scale = TILE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)


@cache
def _font(size: int, file: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    with suppress(OSError):
        return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)
