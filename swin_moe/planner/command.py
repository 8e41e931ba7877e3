"""Runs the planner and prints its tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..common.drawing import check_picture
from ..common.hardware import GB, GIB, Cluster
from ..common.ranks import check_world
from ..common.text import plain
from ..config import Config, load_config
from ..models.cost import count
from .choices import CLOSE, ParallelLayout, Planner, fits, rank_layouts
from .draw import draw, label
from .scaling import PUBLISHED, Point, scaling

IMAGES = {21841: 14_197_122, 1000: 1_281_167}  # of ImageNet-22K and 1K, by number of classes


class DoesNotFit(ValueError):
    """The config is too large; the message has the excess and a layout that fits."""


def plan(
    config: Config,
    cluster: Cluster,
    console: Console,
    *,
    name: str,
    images: int | None = None,
    price: float | None = None,
    simulate: bool = False,
    output: Path = Path("plan.png"),
    json_path: Path | None = None,
) -> None:
    """Print memory, messages and time of a run, and rank the layouts; draw and write them.

    Args:
        config: of the run.
        cluster: of the run.
        console: to print to.
        name: of the config, for titles.
        images: of an epoch; default: the data set's, or those of the ImageNet with as many classes.
        price: of a GPU-hour, in any currency; None = no cost is printed.
        simulate: also scale to more nodes.
        output: the picture.
        json_path: gets all numbers.

    Raises:
        ValueError: the config cannot be laid out on the cluster's ranks.
        DoesNotFit: the config is too large.
    """
    check_picture(output, ".jpg", ".pdf", ".svg")
    planner = Planner(config, cluster, config.ops.fused)
    configured_choice = planner.configured()
    check_world(cluster.size, configured_choice.expert_parallel_size)
    with console.status("tracing the model"):
        configured = planner.lay_out(configured_choice)
        ranked = rank_layouts(planner, configured, cluster)
        curves: dict[str, list[Point]] = {}
        chosen = configured if fits(configured, cluster) or not ranked else ranked[0]
        if simulate:
            curves = {
                "weak: same batch per GPU": scaling(planner, chosen, strong=False),
                "strong: same global batch": scaling(planner, chosen, strong=True),
            }
    report = _Report(planner, configured, ranked, curves, *_images(config, images), price)
    report.print(console, name)
    if simulate:
        console.print(_published(console))
    title = f"{plain(name)} on {cluster.nodes} × {cluster.per_node} {cluster.name}"
    draw(output, title, configured, ranked, cluster, curves)
    console.print(f"picture: {plain(output)}", markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if not fits(configured, cluster):
        raise DoesNotFit(_too_large(planner, configured, ranked))


def _images(config: Config, given: int | None) -> tuple[int, str]:
    """Return the images of an epoch, and the source of the number."""
    if given:
        return given, "--images"
    from ..data.source import open_source

    try:
        source = open_source(config.data, config.model.num_classes, training=True)
        return len(source), config.data.path
    except (ValueError, OSError):
        classes = config.model.num_classes
        if classes not in IMAGES:
            raise ValueError(
                f"data.path={config.data.path} cannot be counted here: give --images N"
            ) from None
        return IMAGES[classes], f"ImageNet of {classes} classes; --images gives another number"


def _too_large(planner: Planner, configured: ParallelLayout, ranked: list[ParallelLayout]) -> str:
    cluster = planner.cluster
    over = (configured.memory.total - cluster.memory) / GIB
    text = (
        f"the config as it stands needs {configured.memory.total / GIB:.1f} GiB of "
        f"{cluster.memory / GIB:.1f} on each {cluster.name}, {over:.1f} too much"
    )
    if ranked and fits(ranked[0], cluster):
        return f"{text}; what fits: {' '.join(ranked[0].choice.overrides())}"
    smallest = ranked[0]
    text += (
        f", and nothing else fits on {cluster.size} of them: {label(smallest)} still needs "
        f"{smallest.memory.total / GIB:.1f}"
    )
    for doublings in range(1, 11):
        more = replace(cluster, nodes=cluster.nodes << doublings)
        for layout in ranked:
            if fits(planner.lay_out(layout.choice, more), more):
                return f"{text}; from --nodes {more.nodes} on {label(layout)} fits"
    return f"{text}; more nodes do not help: take a smaller model or image, or a larger GPU"


class _Report:
    """The numbers of a plan, for the console and for JSON."""

    def __init__(
        self,
        planner: Planner,
        configured: ParallelLayout,
        ranked: list[ParallelLayout],
        curves: dict[str, list[Point]],
        images: int,
        images_from: str,
        price: float | None,
    ) -> None:
        self.planner, self.configured = planner, configured
        self.ranked, self.curves = ranked, curves
        self.images, self.images_from, self.price = images, images_from, price
        config, cluster = planner.config, planner.cluster
        self.unit = "process" if cluster.name == "cpu" else "GPU"
        self.cost = count(config.model, config.moe)
        choice = configured.choice
        self.per_rank = sum(g.elements for g in planner.groups(choice.expert_parallel_size))
        self.batch = choice.images * choice.accumulation * cluster.size
        self.flops = planner.flops(choice)
        updates = config.schedule.epochs * (images // self.batch)
        limit = config.train.max_steps
        self.updates = min(updates, limit) if limit else updates

    def hours(self, layout: ParallelLayout) -> float:
        """Return the hours of the whole run."""
        return self.updates * layout.seconds / 3600

    def gpu_hours(self, layout: ParallelLayout) -> float:
        return self.hours(layout) * self.planner.cluster.size

    def images_per_second(self, layout: ParallelLayout) -> float:
        """Return the images/s of each GPU."""
        return layout.choice.images * layout.choice.accumulation / layout.seconds

    def mfu(self, layout: ParallelLayout) -> float:
        """Return the model FLOPs utilisation: 6 FLOPs a MAC, no recomputation, over the peak."""
        device = self.planner.cluster.device
        peak = device.peak(self.planner.half, self.planner.config.precision.tf32)
        return 6.0 * self.cost.macs * self.images_per_second(layout) / peak

    def cost_of(self, layout: ParallelLayout) -> float | None:
        return None if self.price is None else self.price * self.gpu_hours(layout)

    def as_json(self) -> dict[str, Any]:
        numbers = ("gpus", "images_per_second", "efficiency", "fits")
        return {
            "cluster": asdict(self.planner.cluster),
            "parameters": {**asdict(self.cost), "per_rank": self.per_rank},
            "flops": {"images": self.configured.choice.images, **asdict(self.flops)},
            "checkpoint_bytes": self.checkpoint_bytes,
            "epoch_images": self.images,
            "updates": self.updates,
            "price": self.price,
            "config": self._layout(self.configured),
            "layouts": [self._layout(layout) for layout in self.ranked],
            "scaling": {
                name: [{key: getattr(point, key) for key in numbers} for point in points]
                for name, points in self.curves.items()
            },
        }

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of masters and both moments."""
        return (4 + self.planner.moment_bytes) * self.cost.parameters

    def _layout(self, layout: ParallelLayout) -> dict[str, Any]:
        return {
            "overrides": layout.choice.overrides(),
            "fits": fits(layout, self.planner.cluster),
            "memory": layout.memory.by_kind(),
            "messages": [asdict(message) for message in layout.messages],
            "seconds": layout.seconds,
            "compute": layout.compute,
            "exposed": layout.exposed,
            "update": layout.update,
            "mfu": self.mfu(layout),
            "images_per_second_per_gpu": self.images_per_second(layout),
            "hours": self.hours(layout),
            "days": self.hours(layout) / 24,
            "gpu_hours": self.gpu_hours(layout),
            "cost": self.cost_of(layout),
        }

    # ----------------------------------------------------------------------------------------

    def print(self, console: Console, name: str) -> None:
        cluster, configured = self.planner.cluster, self.configured
        device = cluster.device
        console.print(
            f"{plain(name)} on {cluster.nodes} × {cluster.per_node} {cluster.name} "
            f"({cluster.memory / GIB:.1f} GiB each; {device.source})",
            markup=False,
        )
        cost, images = self.cost, configured.choice.images
        console.print(
            f"parameters  {cost.parameters / 1e6:,.1f} M, {cost.activated / 1e6:,.1f} M activated, "
            f"{self.per_rank / 1e6:,.1f} M on each rank"
        )
        per_image = self.flops.total / images / 1e9
        forward = self.flops.forward / images / 1e9
        ops_used = "compiled" if self.planner.fused else "reference"
        console.print(
            f"products    {forward:,.2f} GFLOP forward, {per_image:,.2f} training an image; "
            f"{self.planner.dtype}, {ops_used} ops"
        )
        console.print(_memory_table(configured, cluster))
        console.print(_message_table(configured))
        self._print_time(console)
        console.print(self._ranking())
        self._print_suggestion(console)
        for title, points in self.curves.items():
            console.print(_curve_table(title, points))

    def _print_suggestion(self, console: Console) -> None:
        best = self.ranked[0]
        if not fits(best, self.planner.cluster):
            return
        near = f"within {100 * (CLOSE - 1):.0f} % of the fastest that fits"
        if best.choice == self.configured.choice:
            text = f"take the config as it is: it is {near}:"
        else:
            text = f"the lowest ZeRO stage {near}, at the same global batch:"
        console.print(text, style="bold")
        console.print("  " + " ".join(best.choice.overrides()), soft_wrap=True)

    def _print_time(self, console: Console) -> None:
        configured, cluster = self.configured, self.planner.cluster
        total, compute, update = configured.seconds, configured.compute, configured.update
        exposed = sum(configured.exposed.values())
        console.print(
            f"an update   {1e3 * total:,.0f} ms: {1e3 * compute:,.0f} computing, "
            f"{1e3 * exposed:,.0f} waiting for messages, {1e3 * update:,.0f} the optimizer"
        )
        console.print(
            f"speed       {self.images_per_second(configured):,.0f} images/s a {self.unit}, "
            f"{self.batch / configured.seconds:,.0f} in all; MFU {100 * self.mfu(configured):.1f} %"
        )
        if self.images < self.batch:
            console.print(
                f"the run     none: the {self.images:,} images of an epoch ({self.images_from}) do "
                f"not fill a batch of {self.batch:,}: lower data.batch_size, or take fewer "
                f"{self.unit}s",
                style="bold",
            )
        hours, cost = self.hours(configured), self.cost_of(configured)
        bill = "" if cost is None else f", {cost:,.2f} at {self.price:g} a {self.unit}-hour"
        console.print(
            f"the run     {self.updates:,} updates of {self.batch:,} images ({self.images:,} an "
            f"epoch: {self.images_from}): {hours:,.2f} hours ({hours / 24:,.1f} days), "
            f"{self.gpu_hours(configured):,.1f} {self.unit}-hours{bill}"
        )
        console.print(f"checkpoint  {self.checkpoint_bytes / GB:,.1f} GB: masters and moments")
        if configured.memory.host:
            node = configured.memory.host * cluster.per_node / GIB
            console.print(f"host memory {node:,.0f} GiB of each node, for what is offloaded")

    def _ranking(self) -> Table:
        cluster = self.planner.cluster
        columns = ["ZeRO", "EP", "images", "steps", "recompute", "offload", "GiB", "fits"]
        columns += ["ms", f"img/s a {self.unit}", "MFU", "hours"]
        columns += [] if self.price is None else ["cost"]
        table = _table("layouts of the same global batch", columns)
        for layout in self.ranked[:16]:
            choice, total = layout.choice, layout.memory.total
            over = (total - cluster.memory) / GIB
            table.add_row(
                str(choice.stage),
                str(choice.expert_parallel_size),
                str(choice.images),
                str(choice.accumulation),
                choice.recomputed,
                "" if choice.offload == "none" else choice.offload,
                f"{total / GIB:.1f}",
                "yes" if over <= 0 else f"+{over:.1f}",
                f"{1e3 * layout.seconds:,.0f}",
                f"{self.images_per_second(layout):,.0f}",
                f"{100 * self.mfu(layout):.1f} %",
                f"{self.hours(layout):,.2f}",
                *([] if (cost := self.cost_of(layout)) is None else [f"{cost:,.2f}"]),
            )
        return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _memory_table(layout: ParallelLayout, cluster: Cluster) -> Table:
    sizes = {k: v for k, v in layout.memory.by_kind().items() if k != "host"}
    sizes |= {"total": layout.memory.total, "of": cluster.memory}
    columns = (kind.replace("_", "-") for kind in sizes)
    table = _table("memory of a rank at the peak, GiB", columns)
    style = "" if fits(layout, cluster) else "red"
    table.add_row(*(f"{size / GIB:.2f}" for size in sizes.values()), style=style)
    return table


def _message_table(layout: ParallelLayout) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title="messages of a rank in an update")
    for column in ("collective", "among", "of", "MB", "not hidden, ms"):
        table.add_column(column, justify="left" if column in ("collective", "of") else "right")
    for message in layout.messages:
        waits = layout.exposed.get(message.what, 0.0)
        table.add_row(
            message.kind,
            message.group,
            message.what,
            f"{message.sent / 1e6:,.1f}",
            f"{1e3 * waits:,.1f}",
        )
    return table


def _curve_table(title: str, points: list[Point]) -> Table:
    table = _table(title, ("GPUs", "ms", "images/s", "efficiency", "GiB", "fits"))
    for point in points:
        table.add_row(
            f"{point.gpus:,}",
            f"{1e3 * point.layout.seconds:,.0f}",
            f"{point.images_per_second:,.0f}",
            f"{100 * point.efficiency:.0f} %",
            f"{point.layout.memory.total / GIB:.1f}",
            "yes" if point.fits else "no",
        )
    return table


def _published(console: Console) -> Table:
    """Return a table of published runs: the reported numbers, and the planner's."""
    columns = ("run", "reported", "planned, compiled ops", "planned, reference ops")
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1), title="published runs")
    with console.status("tracing the published runs"):
        for run in PUBLISHED:
            config = load_config(run.config, run.overrides)
            cells = []
            for fused in (True, False):
                planner = Planner(config, run.cluster, fused)
                layout = planner.lay_out(planner.configured())
                per_gpu = layout.choice.images * layout.choice.accumulation / layout.seconds
                room = layout.memory.total / GIB
                verb = "fits" if fits(layout, run.cluster) else "too large"
                cells.append(f"{per_gpu:,.0f} img/s a GPU; {room:.1f} GiB, {verb}")
            reported = run.report or f"{run.images_per_gpu} img/s a GPU"
            table.add_row(run.title, reported, *cells)
    return table
