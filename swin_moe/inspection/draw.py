"""Draws the two pictures of ``swin-moe inspect``: maps over images, and the experts' patches."""

from __future__ import annotations

import colorsys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..common.drawing import write_png
from .routes import DROPPED, Crop, LayerFindings

SHADE = 0.5  # opacity of an expert's colour over the pixels
NUMBERED = 16  # tokens per side up to which each shows its expert's number
LEGEND = 12  # experts in a legend, from the busiest


def expert_colours(count: int) -> np.ndarray:
    """Return colours [E, 3] in 0..1; successive experts are far apart in hue."""
    hues = [(index * 0.61803399) % 1.0 for index in range(count)]
    values = [(0.95, 0.75, 0.85)[index % 3] for index in range(count)]
    pairs = zip(hues, values, strict=True)
    return np.array([colorsys.hsv_to_rgb(hue, 0.85, value) for hue, value in pairs])


def to_pixels(images: Tensor) -> np.ndarray:
    """Return images [..., C, H, W] in uint8 as pixels [..., H, W, 3] in 0..1."""
    pixels = images.movedim(-3, -1).numpy() / 255
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def shade(pixels: np.ndarray, experts: np.ndarray, patch: int, colours: np.ndarray) -> np.ndarray:
    """Return an image under the colours of the experts that took its patches.

    Dropped patches are hatched in grey.

    Args:
        pixels: [h, w, 3].
        experts: [H, W], or ``DROPPED``.
        patch: pixels per side.
        colours: [E, 3].
    """
    height, width = pixels.shape[:2]
    grown = experts.repeat(patch, 0).repeat(patch, 1)[:height, :width]
    grey = pixels.mean(-1, keepdims=True)
    tint = colours[np.maximum(grown, 0)]
    shaded = (1 - SHADE) * grey + SHADE * tint
    rows, columns = np.indices(grown.shape)
    stripes = np.where((rows + columns) // max(patch // 4, 1) % 2, 0.35, 0.6)[..., None]
    hatched = 0.7 * stripes + 0.3 * grey
    return np.where((grown == DROPPED)[..., None], hatched, shaded)


def draw_maps(
    path: Path,
    title: str,
    images: dict[int, np.ndarray],
    captions: dict[int, str],
    layers: dict[str, LayerFindings],
) -> None:
    """Draw images [h, w, 3] in columns; below each, a row per layer with its patches by expert."""
    from matplotlib import pyplot

    columns, rows = len(images), 1 + len(layers)
    height, width = next(iter(images.values())).shape[:2]
    side = 1.6
    size = (side * columns + 2.6, side * rows * height / width + 0.12 * rows + 0.6)
    figure, axes = pyplot.subplots(
        rows,
        columns + 1,
        figsize=size,
        squeeze=False,
        layout="constrained",
        width_ratios=[1.0] * columns + [2.4 / side],
    )
    figure.suptitle(title, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, (index, pixels) in zip(axes[0], images.items(), strict=False):
        axis.imshow(pixels)
        axis.set_title(captions[index], fontsize=9)
    text = (
        "Each patch has the colour and the number\nof the expert that took it; the bars are\n"
        "the experts' shares of all the patches."
    )
    axes[0, -1].text(0.0, 0.5, text, fontsize=8, va="center", transform=axes[0, -1].transAxes)
    for row, (name, layer) in zip(axes[1:], layers.items(), strict=True):
        colours = expert_colours(len(layer.best))
        row[0].set_ylabel(name, fontsize=9)
        for axis, (index, pixels) in zip(row, images.items(), strict=False):
            _draw_map(axis, pixels, layer.maps[index].numpy(), layer.patch, colours)
        _draw_legend(row[-1], layer, colours)
    _save(figure, path)


def _draw_map(
    axis: Any, pixels: np.ndarray, experts: np.ndarray, patch: int, colours: np.ndarray
) -> None:
    axis.imshow(shade(pixels, experts, patch, colours), interpolation="nearest")
    if max(experts.shape) > NUMBERED:
        return
    size = min(9.0, 64.0 / max(experts.shape))
    for (row, column), expert in np.ndenumerate(experts):
        if expert != DROPPED:
            x, y = (column + 0.5) * patch - 0.5, (row + 0.5) * patch - 0.5
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size}
            axis.text(x, y, str(expert), color="white", **style)


def _draw_legend(axis: Any, layer: LayerFindings, colours: np.ndarray) -> None:
    """Draw the loads of the busiest experts as bars, in the colours of the maps."""
    load = layer.load
    order = sorted(range(len(load)), key=lambda expert: -load[expert])
    many = len(order) > LEGEND
    shown = sorted(e for e in order[:LEGEND] if load[e] > 0) if many else list(range(len(load)))
    places = range(len(shown))
    axis.barh(places, [100 * load[e] for e in shown], color=[colours[e] for e in shown])
    axis.set_yticks(places, [str(expert) for expert in shown], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(100 / len(load), color="black", lw=0.8, ls=":", zorder=0)
    axis.margins(x=0.25)
    for place, expert in zip(places, shown, strict=True):
        text = f"{100 * load[expert]:.1f} %"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axis.annotate(
            text, (100 * load[expert], place), (3, 0), textcoords="offset points", fontsize=7,
            va="center", bbox=box,
        )  # fmt: skip
    notes = []
    if many:
        notes.append(f"the busiest {len(shown)} of {len(order)} experts")
    if layer.dropped:
        notes.append("hatched: dropped")
    axis.set_title(", ".join(notes) or "load, dotted = even", fontsize=8)


def draw_experts(path: Path, title: str, layers: dict[str, LayerFindings]) -> None:
    """Draw a contact sheet: a row per expert with the patches that it weighs most.

    Experts that took nothing have no row.
    """
    from matplotlib import pyplot

    active = {name: [e for e, best in enumerate(layers[name].best) if best] for name in layers}
    experts = max(1, *(len(rows) for rows in active.values()))
    crops = max(1, *(len(best) for layer in layers.values() for best in layer.best))
    tile = 48 if experts <= 32 else 32
    scale = 0.01 * tile
    across = min(len(layers), 3)
    down = -(-len(layers) // across)
    size = (across * (crops * scale + 1.0), down * (experts * scale + 0.4) + 0.7)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    figure.suptitle(
        f"{title}: the patches that weigh most for each expert,\n"
        "with half a patch of dimmed surroundings",
        fontsize=10,
    )
    for axis, (name, layer) in zip(axes.flat, layers.items(), strict=False):
        rows, load = active[name], layer.load
        sheet = _sheet([layer.best[e] for e in rows], layer.patch, (experts, crops), tile)
        axis.imshow(sheet, interpolation="nearest")
        idle = len(load) - len(rows)
        axis.set_title(name + f", {idle} experts took nothing" * (idle > 0), fontsize=9)
        places = [(index + 0.5) * tile - 0.5 for index in range(len(rows))]
        axis.set_yticks(places, [f"{e}: {100 * load[e]:.1f} %" for e in rows], fontsize=7)
        colours = 0.8 * expert_colours(len(load))
        for label, expert in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_color(colours[expert])
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
    _save(figure, path)


def _sheet(rows: list[list[Crop]], patch: int, shape: tuple[int, int], tile: int) -> np.ndarray:
    """Return pixels [h, w, 3] of ``shape`` (rows, columns) tiles; missing patches are white."""
    sheet = np.ones((shape[0] * tile, shape[1] * tile, 3))
    pick_from = np.arange(tile - 2)
    for row, best in enumerate(rows):
        for column, one in enumerate(best):
            pixels = to_pixels(one.pixels)
            side = pixels.shape[0]
            inner = slice((side - patch) // 2, (side + patch) // 2)
            tiled = 0.45 * pixels + 0.2  # dimmed
            tiled[inner, inner] = pixels[inner, inner]
            pick = pick_from * side // (tile - 2)
            y, x = row * tile + 1, column * tile + 1
            sheet[y : y + tile - 2, x : x + tile - 2] = tiled[pick][:, pick]
    return sheet


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    write_png(path, partial(figure.savefig, dpi=100, format="png"))
    pyplot.close(figure)
