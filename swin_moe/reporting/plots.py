"""``summary.png``: a run at one look, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..common.drawing import drawing, write_png
from ..common.text import plain, reason
from ..tasks import Metric
from .metric_log import MetricLog, Record, read_metrics

log = logging.getLogger("swin_moe")

# What is drawn of every MoE layer over time: key and title.
ROUTER_CURVES = (
    ("max_violation", "max violation: greatest load ÷ even − 1"),
    ("drop_rate", "assignments dropped (%)"),
    ("gate_entropy", "gate entropy (0 certain, 1 uniform)"),
    ("dead_experts", "dead experts (without a token)"),
)
COLUMNS = 12  # of the grid that all rows share
NAMED = 12  # layers that fit one line of a legend
EVENTS = 160  # columns of a heat map, at most: more are joined


def show_picture(metrics: MetricLog, key: str, path: Path, draw: Callable[[], Any]) -> None:
    """Draw a picture of a training and put it into TensorBoard.

    Any failure is a warning: no training ends because of a picture.
    """
    try:
        draw()
        if path.exists():
            metrics.image(key, path)
    except Exception as error:
        log.warning("%s cannot be drawn: %s", plain(path), reason(error))
        log.debug("this is why:", exc_info=True)


def draw_summary(folder: Path, metrics: Sequence[Metric]) -> Path | None:
    """Draw ``summary.png``: loss, metrics, and how the routers of each MoE layer fared.

    Args:
        metrics: of the task.

    Returns:
        its path, None if nothing was logged yet.
    """
    records = read_metrics(folder)
    if not records:
        return None
    name = plain(folder.absolute().name)
    path = folder / "summary.png"
    with drawing(name):
        _draw(name, records, path, metrics)
    return path


def _draw(name: str, records: list[Record], path: Path, metrics: Sequence[Metric]) -> None:
    from matplotlib import pyplot

    layers = [k[4:-5] for k in _last_with(records, "moe/") if k.endswith("/load")]
    across = min(max(len(layers), 1), 4)
    maps = -(-len(layers) // across)
    heights = [3.4, *([2.8, 0.3] if layers else []), *[2.6] * maps]
    figure = pyplot.figure(figsize=(16, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    _draw_curves(
        figure.add_subplot(grid[0, :6]),
        records,
        {"train/loss": "training", "val/loss": "held out"},
        "loss",
    )
    _draw_curves(
        figure.add_subplot(grid[0, 6:]),
        records,
        *_second_panel(metrics),
    )
    if layers:
        colours = dict(zip(layers, _colours(len(layers)), strict=True))
        _draw_routers(figure, grid, records, colours)
        _draw_loads(figure, grid, records, colours, across)
    figure.suptitle(name)
    write_png(path, partial(figure.savefig, dpi=100, format="png"))
    pyplot.close(figure)


def _second_panel(metrics: Sequence[Metric]) -> tuple[dict[str, str], str]:
    """Curves next to those of the loss, and their title."""
    shown = [metric for metric in metrics if metric.key != "loss"]
    if not shown:
        return {"train/grad_norm": "before clipping"}, "gradient norm"
    units = {metric.unit for metric in shown}
    title = "accuracy (%)" if units == {"%"} else ", ".join(metric.label for metric in shown)
    return {f"val/{metric.key}": metric.label for metric in shown}, title


def _last_with(records: list[Record], prefix: str) -> Record:
    for record in reversed(records):
        if any(key.startswith(prefix) for key in record):
            return record
    return {}


def _colours(count: int) -> list[Any]:
    """From the first layer to the last, so that their order shows."""
    from matplotlib import colormaps

    return [colormaps["turbo"](x) for x in np.linspace(0.08, 0.92, max(count, 2))[:count]]


def _draw_curves(axis: Any, records: list[Record], keys: dict[str, str], title: str) -> None:
    for key, label in keys.items():
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if "val" in key else "")
    axis.set(title=title, xlabel="update")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def _draw_routers(figure: Any, grid: Any, records: list[Record], colours: dict[str, Any]) -> None:
    """Row 1: a curve per layer in each panel; row 2: which colour is which layer."""
    width = COLUMNS // len(ROUTER_CURVES)
    for index, (key, title) in enumerate(ROUTER_CURVES):
        axis = figure.add_subplot(grid[1, width * index : width * (index + 1)])
        top = 1.0
        for layer, colour in colours.items():
            name = f"moe/{layer}/{key}"
            points = [(r["step"], r[name]) for r in records if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, lw=1.2, label=layer)
                top = max(top, *(value for _, value in points))
        axis.set(xlabel="update", ylim=(-0.03 * top, 1.05 * top))
        axis.set_title(title, fontsize=11)
        axis.locator_params(axis="y", nbins=6, integer=key == "dead_experts")
        axis.grid(alpha=0.3)
    legend = figure.add_subplot(grid[2, :])
    legend.set_axis_off()
    if axis.lines:
        handles, names = axis.get_legend_handles_labels()
        short = [name.replace("layers.", "").replace(".blocks.", ".") for name in names]
        many = len(names) > NAMED // 2
        legend.legend(
            handles,
            short if many else names,
            title="stage.block" if many else None,
            title_fontsize=9,
            ncols=min(len(names), NAMED),
            loc="center",
            frameon=False,
            fontsize=9,
        )


def _draw_loads(
    figure: Any, grid: Any, records: list[Record], colours: dict[str, Any], across: int
) -> None:
    """From row 3 on: the load of each expert over time, a map per layer, with one colour bar."""
    width, axes, image = COLUMNS // across, [], None
    for index, (layer, colour) in enumerate(colours.items()):
        row, column = 3 + index // across, index % across
        axis = figure.add_subplot(grid[row, width * column : width * (column + 1)])
        image = _draw_load(axis, records, layer)
        axis.set_title(f"load of each expert, {layer}", fontsize=11)
        axis.spines[:].set(color=colour, linewidth=2.5)
        if column == 0:
            axis.set_ylabel("expert")
        if index + across >= len(colours):
            axis.set_xlabel("update")
        axes.append(axis)
    bar = figure.colorbar(image, ax=axes, label="× even share", aspect=30, pad=0.01, extend="max")
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0, dead", "0.5", "1", "1.5", "2"])


def _draw_load(axis: Any, records: list[Record], layer: str) -> Any:
    key = f"moe/{layer}/load"
    chosen = [r for r in records if key in r]
    load = np.array([r[key] for r in chosen]).T  # [E, time]
    experts, logs = load.shape
    steps = [r["step"] for r in chosen]
    joined = np.array_split(np.arange(logs), min(logs, EVENTS))
    shown = np.stack([load[:, part].mean(1) for part in joined], 1)
    axis.set_yticks(range(0, experts, max(1, experts // 8)))
    return axis.imshow(
        shown * experts,
        aspect="auto",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
        interpolation="nearest",
        extent=(steps[0], max(steps[-1], steps[0] + 1), experts - 0.5, -0.5),
    )
