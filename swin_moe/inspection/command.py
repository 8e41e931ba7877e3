"""Runs a checkpoint over held-out images, and makes the pictures and tables of its experts."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..common.drawing import check_picture, drawing
from ..common.terminal import cell
from ..common.text import plain, shorten
from ..data import Loader
from ..distributed import World
from ..evaluate import Opened, open_checkpoint
from ..models.build import stage_of
from ..moe import moe_layers, num_experts
from .draw import draw_experts, draw_maps, to_pixels
from .routes import LayerFindings, watched

SAMPLES = 512  # held-out images in the statistics
CROPS = 12  # patches per expert on the contact sheet
LAYERS = 6  # in one picture
ROWS = 16  # experts in a table, from the busiest


def inspect_checkpoint(
    path: Path,
    world: World,
    console: Console,
    overrides: list[str],
    *,
    images: int = 8,
    output: Path | None = None,
    layers: list[str] | None = None,
) -> tuple[Path, Path]:
    """Draw which experts take the patches of held-out images.

    Args:
        path: run directory or checkpoint; any number of processes may have trained it.
        world: of one process.
        console: gets the tables.
        overrides: of the config.
        images: number to draw.
        output: default ``inspect.png`` in the run directory.
        layers: names of MoE layers; default: the last that fit.

    Returns:
        Paths of the maps, and of the experts' patches, ``<output>-experts.png``.

    Raises:
        ValueError: the checkpoint has no MoE layers, or an argument is wrong.
    """
    if images < 1:
        raise ValueError(f"--images={images}: draw at least one")
    first = _output(path, output)
    opened = open_checkpoint(path, world, overrides, command="inspect")
    try:
        names = choose_layers(opened.model, opened.path, layers or [])
        drawn, found = collect(opened, names, images, world.device)
    finally:
        opened.loader.close()
    classes = opened.loader.class_names
    pixels = {index: to_pixels(image) for index, (image, _) in drawn.items()}
    captions = {i: shorten(_class_name(classes, label)) for i, (_, label) in drawn.items()}
    title = _title(opened.path.resolve())
    second = first.with_name(f"{first.stem}-experts.png")
    with drawing(title, *captions.values()):
        draw_maps(first, title, pixels, captions, found)
        draw_experts(second, title, found)
    for name, layer in found.items():
        console.print(_table(name, layer, classes))
    for picture in (first, second):
        console.print(f"drew {plain(picture)}", highlight=False, markup=False, soft_wrap=True)
    return first, second


def _output(path: Path, output: Path | None) -> Path:
    if output is None:
        folder = path.resolve()
        if (folder / "manifest.json").exists():  # nothing is written into a checkpoint
            folder = folder.parent
            folder = folder.parent if folder.name == "checkpoints" else folder
        return folder / "inspect.png"
    return check_picture(output)


def _title(checkpoint: Path) -> str:
    inside_run = checkpoint.parent.name == "checkpoints"
    run = f"{checkpoint.parent.parent.name}, " if inside_run else ""
    return plain(f"{run}{checkpoint.name}")


def choose_layers(model: nn.Module, path: Path, wanted: list[str]) -> list[str]:
    """Return the names of the MoE layers to draw.

    Args:
        path: of the checkpoint, for messages.
        wanted: names that the user gave; empty = the last that fit.

    Raises:
        ValueError: the model has no MoE layers, or none of a wanted name.
    """
    names = list(moe_layers(model))
    if not names:
        raise ValueError(f"{plain(path)}: the model has no MoE layers (moe.blocks is empty)")
    for name in wanted:
        if name not in names:
            raise ValueError(f"--layer {name}: the model's MoE layers are {', '.join(names)}")
    return [name for name in names if name in wanted] or names[-LAYERS:]


def collect(
    opened: Opened, names: list[str], count: int, device: torch.device
) -> tuple[dict[int, tuple[Tensor, int]], dict[str, LayerFindings]]:
    """Run the model over held-out images, evenly spread over the split.

    Args:
        names: of the layers.
        count: images to draw.

    Returns:
        Images [C, H, W] to draw with their labels, by index; findings by layer.

    Raises:
        ValueError: no image is readable.
    """
    model, loader, config = opened.model, opened.loader, opened.task.config
    samples = min(max(SAMPLES, count), loader.num_samples)
    indices = [place * loader.num_samples // samples for place in range(samples)]
    wanted = _one_of_each(loader, indices, count)
    patch = config.model.patch_size
    classes = config.model.num_classes or len(loader.class_names or ())
    found = {
        name: LayerFindings.empty(patch << stage_of(name), num_experts(model), classes)
        for name in names
    }
    drawn: dict[int, tuple[Tensor, int]] = {}
    size = config.data.eval_batch_size or config.data.batch_size
    for start in range(0, samples, size):
        part = indices[start : start + size]
        batch = loader.pick(part)
        valid = batch.valid
        prepared = opened.task.prepare(batch.to(device), start, training=False)
        images, labels = batch.inputs["images"][valid], batch.targets[valid]
        part = [index for index, good in zip(part, valid.tolist(), strict=True) if good]
        if not part:
            continue
        with torch.no_grad(), watched(model) as seen:
            opened.forward({key: x[prepared.valid] for key, x in prepared.inputs.items()})
        for name, layer in found.items():
            layer.add(images, labels, seen[name], CROPS)
            maps = seen[name].expert.cpu()
            layer.maps |= {i: maps[at] for at, i in enumerate(part) if i in wanted}
        both = zip(part, images, labels.tolist(), strict=True)
        drawn |= {i: (image, label) for i, image, label in both if i in wanted}
    if not drawn:
        raise ValueError("none of the held-out images is readable: check data.path and data.val")
    return {i: drawn[i] for i in wanted if i in drawn}, found


def _one_of_each(loader: Loader, indices: list[int], count: int) -> list[int]:
    """Return ``count`` indices: the first of each class, then the second of each, and so on."""
    seen: dict[int, int] = {}
    order = []
    for index in indices:
        label = loader.label(index)
        seen[label] = seen.get(label, 0) + 1
        order.append((seen[label], label, index))
    return [index for _, _, index in sorted(order)[:count]]


def _class_name(names: list[str] | None, label: int) -> str:
    return plain(names[label]) if names else f"class {label}"


def _table(name: str, layer: LayerFindings, classes: list[str] | None) -> Table:
    """Return a table with the load and the most frequent classes of each expert."""
    table = Table("expert", "load", "most frequent classes", title=name, title_justify="left")
    table.columns[0].justify = table.columns[1].justify = "right"
    load = layer.load
    order = sorted(range(len(load)), key=lambda expert: -load[expert])
    busiest = [expert for expert in order[:ROWS] if load[expert] > 0]
    shown = range(len(load)) if len(load) <= ROWS else busiest
    for expert in shown:
        counts = layer.classes[expert]
        total = max(int(counts.sum()), 1)
        best = counts.topk(min(3, len(counts)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        text = [f"{_class_name(classes, c)} {100 * n / total:.0f} %" for c, n in pairs if n]
        table.add_row(str(expert), f"{100 * load[expert]:.1f} %", cell(", ".join(text)))
    rest = [load[expert] for expert in order[len(shown) :]]
    if rest:
        dead = rest.count(0.0)
        table.add_row(
            "…", f"{100 * sum(rest):.1f} %", f"{len(rest)} others, {dead} without a token"
        )
    if layer.dropped:
        table.caption = f"{layer.dropped} patches were dropped"
    return table
