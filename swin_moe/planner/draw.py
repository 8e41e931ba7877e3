"""Draws plan.png: the memory of each layout by kind, the device's limit, and the scaling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.hardware import GIB, Cluster
from .choices import ParallelLayout
from .scaling import Point

if TYPE_CHECKING:  # a training imports the planner too, and does not draw
    from matplotlib.axes import Axes

# Names and colours of the kinds; the colours also differ in brightness.
KINDS = {
    "weights": ("weights", "#1f4e79"),
    "gradients": ("gradients", "#4a90c2"),
    "optimizer": ("optimizer", "#9cc5e3"),
    "buckets": ("ZeRO buckets", "#7a5195"),
    "activations": ("activations", "#e08e45"),
    "all_to_all": ("all-to-all buffers", "#c0392b"),
    "update": ("of the update", "#c9b458"),
    "margin": ("margin", "#d5d5d5"),
}


def label(layout: ParallelLayout, configured: bool = False) -> str:
    """Return a layout in a few words."""
    choice = layout.choice
    words = [f"ZeRO-{choice.stage}", f"{choice.images} img"]
    if choice.expert_parallel_size > 1:
        words.append(f"EP {choice.expert_parallel_size}")
    if choice.accumulation > 1:
        words.append(f"× {choice.accumulation}")
    if choice.checkpoint:
        words.append(f"ckpt {choice.recomputed}")
    if choice.offload != "none":
        words.append(choice.offload)
    return ", ".join(words) + (" (config)" if configured else "")


def draw(
    path: Path,
    title: str,
    configured: ParallelLayout,
    layouts: list[ParallelLayout],
    cluster: Cluster,
    curves: dict[str, list[Point]],
) -> None:
    """Write the picture.

    Args:
        path: of the picture.
        title: above the picture.
        configured: layout of the config, drawn first.
        layouts: ranked, best first.
        cluster: of the run.
        curves: scaling curves by name; empty = no second panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [configured, *layouts[:14]]
    height = 1.6 + 0.34 * len(rows)
    figure = Figure(figsize=(15 if curves else 10.5, max(height, 4.2)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, parse_math=False)
    grid = figure.add_gridspec(1, 2 if curves else 1, width_ratios=[1.7, 1] if curves else [1])
    _bars(figure.add_subplot(grid[0]), rows, cluster)
    if curves:
        _scaling(figure.add_subplot(grid[1]), curves)
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, rows: list[ParallelLayout], cluster: Cluster) -> None:
    limit = cluster.memory / GIB
    start = [0.0] * len(rows)
    places = range(len(rows))
    for kind, (name, colour) in KINDS.items():
        sizes = [getattr(row.memory, kind) / GIB for row in rows]
        if any(sizes):
            axes.barh(places, sizes, left=start, color=colour, label=name, height=0.72)
            start = [a + b for a, b in zip(start, sizes, strict=True)]
    reach = max(limit, min(max(start), 2.5 * limit)) * 1.16
    for place, row, total in zip(places, rows, start, strict=True):
        text = f"{total:.1f} GiB, {1e3 * row.seconds:.0f} ms"
        too_much = total > limit
        x = min(total, reach) - (0.01 * reach if total >= reach else -0.008 * reach)
        axes.text(
            x, place, text, va="center", ha="right" if total >= reach else "left", fontsize=8,
            color="#b00020" if too_much else "black",
        )  # fmt: skip
    axes.axvline(limit, color="#b00020", linewidth=1.6)
    axes.text(
        limit, -0.75, f"{cluster.name}: {limit:.1f} GiB ", color="#b00020", fontsize=9, ha="right"
    )
    axes.set_yticks(list(places), [label(row, i == 0) for i, row in enumerate(rows)], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -1.2)
    axes.set_xlim(0, reach)
    axes.set_xlabel("GiB of each GPU at the peak of a step" if cluster.name != "cpu" else "GiB")
    axes.legend(loc="lower right", fontsize=8, framealpha=0.95)
    axes.spines[["top", "right"]].set_visible(False)


def _scaling(axes: Axes, curves: dict[str, list[Point]]) -> None:
    for (name, points), colour in zip(curves.items(), ("#1f4e79", "#e08e45"), strict=False):
        gpus = [point.gpus for point in points]
        axes.plot(gpus, [p.images_per_second for p in points], "o-", color=colour, label=name)
        last = points[-1]
        axes.annotate(
            f"{100 * last.efficiency:.0f} %", (last.gpus, last.images_per_second),
            textcoords="offset points", xytext=(4, -12), fontsize=8.5, color=colour,
        )  # fmt: skip
    first = next(iter(curves.values()))[0]
    span = [points[-1].gpus for points in curves.values()]
    ideal = [first.gpus, max(span)]
    per_gpu = first.images_per_second / first.gpus
    axes.plot(ideal, [per_gpu * n for n in ideal], "--", color="#999999", label="linear")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks([p.gpus for p in next(iter(curves.values()))])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images/s (by the roofline)")
    axes.legend(fontsize=8.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
