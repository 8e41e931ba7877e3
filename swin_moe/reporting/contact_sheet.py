"""A picture of what a model sees: images as the task prepares them, with captions."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from ..common.drawing import check_picture, font_file, write_png
from ..common.text import plain
from ..config import Config
from ..data import Batch, Loader
from ..data.loader import loader_of
from ..tasks import Task, build_task

LOOKED_AT = 1000  # held-out samples, for some of several classes
COLUMNS, ROWS = 8, 4  # of training images; below them comes a row of held-out ones
TILE, GAP, LABEL, TITLE = 142, 8, 40, 34  # pixels: of an image, between, of two lines, on top

Cell = tuple[np.ndarray, str]  # pixels [H, W, C] in 0..1, and the caption


def show(config: Config, output: Path, console: Console) -> None:
    """Draw the first images of the first epoch, as the first of all processes will see them.

    Raises:
        ValueError: one line, for a config or data that cannot be used.
    """
    check_picture(output)
    task = build_task(config)
    task.check()
    train = loader_of(config, True, collate=task.collate)
    task.class_names = train.class_names
    loaders = [train, loader_of(config, False, classes=train.class_names, collate=task.collate)]
    for loader in loaders:
        console.print(plain(loader.description), highlight=False, markup=False, soft_wrap=True)
    contact_sheet(task, loaders[0], loaders[1], output)
    for loader in loaders:
        loader.close()
    console.print(f"the picture is {plain(output)}", highlight=False, markup=False, soft_wrap=True)


def contact_sheet(task: Task, train: Loader, val: Loader, path: Path) -> None:
    """A PNG of the batches that training begins with, and of the first held-out images.

    Both are read in this process alone, and nothing that training draws is changed by it.
    """
    wanted = COLUMNS * ROWS
    cells: list[Cell] = []
    for step, batch in enumerate(train.peek(-(-wanted // task.config.data.batch_size))):
        cells += _cells(task, batch, step, training=True)
    held_out = _cells(task, val.pick(_of_several_classes(val)), 0, training=False)
    draw_sheet(cells[:wanted], held_out[:COLUMNS], path)


def _cells(task: Task, batch: Batch, step: int, training: bool) -> list[Cell]:
    """The readable images of a batch, prepared for the model, with their captions."""
    pixels, captions = task.preview(task.prepare(batch, step, training))
    valid = batch.valid.tolist()
    return [
        (image.numpy(), caption)
        for image, caption, good in zip(pixels, captions, valid, strict=True)
        if good
    ]


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


def draw_sheet(training: list[Cell], held_out: list[Cell], path: Path) -> None:
    """Tiles with their labels; pixels [H, W, C] are in 0..1."""
    rows = [training[i : i + COLUMNS] for i in range(0, len(training), COLUMNS)] + [held_out]
    step = TILE + GAP, TILE + LABEL
    sheet = Image.new("RGB", (COLUMNS * step[0] + GAP, len(rows) * step[1] + TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    own, other = font_file(""), font_file("".join(label for row in rows for _, label in row))
    title = "training, as the model sees it; last row: held out"
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
