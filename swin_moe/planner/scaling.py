"""Weak and strong scaling by the roofline, and published runs for a comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..common.hardware import Cluster
from .choices import ParallelLayout, Planner, fits

MOST = 2048  # GPUs


@dataclass(frozen=True)
class Point:
    """A layout on a number of GPUs; efficiency is images/s per GPU over the first point's."""

    gpus: int
    layout: ParallelLayout
    images_per_second: float
    efficiency: float
    fits: bool


def scaling(planner: Planner, layout: ParallelLayout, strong: bool) -> list[Point]:
    """Return points on 1, 2, 4, … times the nodes, with the same batch per GPU.

    Args:
        strong: with the same global batch instead, until each GPU has one image.
    """
    base, choice = planner.cluster, layout.choice
    whole = choice.images * choice.accumulation * base.size
    points: list[Point] = []
    nodes = base.nodes
    while nodes * base.per_node <= max(MOST, base.size):
        cluster = replace(base, nodes=nodes)
        each, rest = divmod(whole, cluster.size)
        here = choice
        if strong:
            if each == 0 or rest:
                break
            images = max(n for n in range(1, choice.images + 1) if each % n == 0)
            here = replace(choice, images=images, accumulation=each // images)
        found = planner.lay_out(here, cluster)
        made = here.images * here.accumulation * cluster.size / found.seconds
        first = points[0].images_per_second / points[0].gpus if points else made / cluster.size
        points.append(
            Point(cluster.size, found, made, made / cluster.size / first, fits(found, cluster))
        )
        nodes *= 2
    return points


@dataclass(frozen=True)
class PublishedRun:
    """A run as its authors report it, and the config that corresponds to it.

    Attributes:
        source: of the report.
        config: name of its recipe.
        images_per_gpu: reported images/s.
        report: in words, if no speed is reported.
    """

    title: str
    source: str
    config: str
    overrides: tuple[str, ...]
    cluster: Cluster
    images_per_gpu: float | None = None
    report: str = ""


_TUTEL = "Tutel, https://arxiv.org/abs/2206.03382, table 8"
_A100 = Cluster("a100-40", 4, 8)
PUBLISHED = [
    PublishedRun(
        "SwinV2-B dense, 192 px, 32 A100",
        _TUTEL,
        "imagenet22k/swinv2_base",
        ("data.batch_size=128",),
        _A100,
        288,
    ),
    PublishedRun(
        "SwinV2-MoE-B, 32 experts, 32 A100",
        _TUTEL,
        "imagenet22k/swinv2_moe_base_32expert",
        ("data.batch_size=128", "parallel.expert_parallel_size=32", "zero.stage=1"),
        _A100,
        249,
    ),
    PublishedRun(
        "SwinV2-G, 3 B, 40 GB A100, plain",
        "Swin V2, https://arxiv.org/abs/2111.09883, section 3.4",
        "scale/swinv2_g_3b",
        ("model.use_checkpoint=false", "zero.stage=0", "data.batch_size=2"),
        _A100,
        report="did not fit",
    ),
    PublishedRun(
        "SwinV2-G, ZeRO-1 and checkpointing",
        "Swin V2, section 3.4",
        "scale/swinv2_g_3b",
        ("model.use_checkpoint=true", "zero.stage=1", "data.batch_size=2"),
        _A100,
        report="fitted, with sequential attention",
    ),
]
