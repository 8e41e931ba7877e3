"""Tables in the terminal: the header, the closing table, the table of classes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import ops
from ..checkpoint import list_checkpoints
from ..common.terminal import cell
from ..common.text import plain
from ..config import REFERENCE_BATCH, Config, ModelConfig, MoEConfig
from ..data import Loader
from ..distributed import World
from ..models.cost import Cost
from ..tasks import Evaluation, Metric


def header(
    config: Config,
    folder: Path,
    world: World,
    dtype: torch.dtype,
    cost: Cost,
    loaders: list[Loader],
) -> Table:
    """Return the table at the start of a run: model, data, world, ZeRO, precision and ops."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("run", cell(folder))
    table.add_row("task", config.task.name)
    table.add_row("model", _model(config.model, config.moe))
    table.add_row(
        "parameters",
        f"{cost.parameters / 1e6:.2f} M, {cost.activated / 1e6:.2f} M activated; "
        f"{cost.macs / 1e9:.3f} GMACs an image",
    )
    table.add_row("data", Text("\n".join(plain(loader.description) for loader in loaders)))
    table.add_row(
        "world",
        f"{world.size} processes = {world.expert_data.size} data × {world.expert.size} expert "
        f"parallel, on {_device_name(world)}",
    )
    micro, accumulation = config.data.batch_size, config.train.micro_steps
    parts = f"{micro} × {world.size} processes" + f" × {accumulation} steps" * (accumulation > 1)
    batch = micro * accumulation * world.size
    table.add_row("batch", f"{batch} images an update = {parts}")
    table.add_row("rate", _rate(config, batch))
    offload = (
        f", offload to {config.zero.offload_optimizer}"
        if config.zero.offload_optimizer != "none"
        else ""
    )
    moments = ", bf16 moments" if config.optimizer.moments == "bf16" else ""
    table.add_row("ZeRO", f"stage {config.zero.stage}{offload}{moments}")
    table.add_row("precision", _precision(config, world, dtype))
    table.add_row("ops", _ops(world, dtype))
    if config.model.attention_chunk:
        table.add_row("attention", _sequential(config.model.attention_chunk, world))
    others = f" to rank-{world.size - 1}.log" if world.size > 1 else ""
    table.add_row("log", cell(f"{folder / 'logs' / 'rank-0.log'}{others}"))
    return table


def _rate(config: Config, batch: int) -> str:
    """Describe the peak rate, to compare it with a recipe or another batch."""
    base, decay = config.optimizer.base_lr, config.optimizer.layer_decay
    peak = base * batch / REFERENCE_BATCH
    text = f"{_short(base, 6)} × {batch}/{REFERENCE_BATCH} = {_short(peak, 2)} at its peak"
    return text + (f", × {decay:g} for each layer below the head" if decay < 1 else "")


def _short(value: float, digits: int) -> str:
    """Format a rate: 3.1e-5, 5e-4, 0.016."""
    if value >= 0.01:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _precision(config: Config, world: World, dtype: torch.dtype) -> str:
    """Return the dtype, why ``auto`` has chosen it if it is not bf16, and the use of TF32."""
    on_gpu = world.device.type == "cuda"
    notes = [] if config.precision.dtype != "auto" or not on_gpu else ["this GPU has no bf16"]
    if dtype == torch.float32:
        if config.precision.tf32:
            notes.append("TF32 products" if on_gpu else "no TF32 on a CPU")
        return "; ".join(["fp32", *notes])
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    weights = f"{name} weights, fp32 masters" if config.zero.stage else "autocast over fp32 weights"
    if dtype == torch.bfloat16:
        return f"{name} ({weights})"
    return "; ".join([f"{name} ({weights}, dynamic loss scale)", *notes])


def _ops(world: World, dtype: torch.dtype) -> str:
    """Return the choice for each op, and the attention's instruction set on a CPU."""
    choices = ops.choices(world.device.type)
    if not choices:
        return "PyTorch references"
    lines = ops.describe(choices).split("; ")
    instructions = ops.cpu_instruction_set(dtype)
    if world.device.type == "cpu" and instructions and _attention_is_fused(world):
        lines.append(f"attention kernels for {instructions}")
    return "\n".join(lines)


def _attention_is_fused(world: World) -> bool:
    choices = ops.choices(world.device.type)
    mine = [choice.fused for key, choice in choices.items() if key.op == "window_attention"]
    return bool(mine) and all(mine)


def _sequential(chunk: int, world: World) -> str:
    if _attention_is_fused(world):
        return "its kernels store no matrices: model.attention_chunk saves nothing here"
    return f"{chunk} windows at a time, computed again in the backward pass"


def _model(model: ModelConfig, moe: MoEConfig) -> str:
    height, width = model.image_sides
    sides = height if height == width else f"{height}×{width}"
    text = f"{model.name}, {sides} px, window {model.window_size}"
    if not moe.enabled:
        return text
    layers = sum(len(blocks) for blocks in moe.blocks)
    capacity = f"capacity {moe.capacity_factor:g}" if moe.capacity_factor else "dropless"
    return f"{text}\n{moe.num_experts} experts in {layers} layers, top-{moe.top_k}, {capacity}"


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU ({torch.get_num_threads()} threads each, {os.cpu_count()} cores)"


@dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
        evaluation: the last evaluation; None if nothing was left to do.
        best: best value of ``metric``, reached at ``best_step``.
        unreadable: number of unreadable training images.
        limit: the key that ended the training.
    """

    metric: Metric
    evaluation: Evaluation | None
    best: float | None
    best_step: int
    unreadable: int
    images_per_second: float
    limit: str


def closing(folder: Path, result: Result, seconds: float) -> Table:
    """Return the table at the end of a run: result and paths."""
    table = Table(title="done", title_justify="left", show_header=False)
    found, metric = result.evaluation, result.metric
    if found is not None and result.best is not None:
        best = f"best {metric.format(result.best)} at step {result.best_step}"
        table.add_row(metric.label, f"{metric.format(found.metrics[metric.key])} ({best})")
        table.add_row("time", f"{seconds / 60:.1f} min, {result.images_per_second:.0f} images/s")
    else:
        way = f"raise {result.limit} to go on; --fresh starts from the beginning"
        table.add_row("trained", f"nothing was left to do: {way}")
    unreadable = result.unreadable + (found.unreadable if found is not None else 0)
    if unreadable:
        table.add_row("unreadable", f"{unreadable} images were skipped; see the logs")
    if (folder / "summary.png").exists():
        table.add_row("picture", cell(folder / "summary.png"))
    last = folder / "checkpoints" / "last"
    newest = list_checkpoints(last.parent)
    # A file system without links has no `last`, or an old copy.
    is_last = not newest or last.resolve().name == newest[0].name
    table.add_row("checkpoint", cell(last if is_last else newest[0]))
    table.add_row("metrics", cell(folder / "metrics.jsonl"))
    table.add_row("logs", cell(folder / "logs"))
    quoted = shlex.quote(str(folder))
    if (folder / "tensorboard").exists():
        table.add_row("curves", cell(f"tensorboard --logdir {quoted}"))
    table.add_row("again", cell(f"swin-moe evaluate {quoted}"))
    return table


def print_evaluation(
    console: Console, path: Path, result: Evaluation, metrics: Sequence[Metric]
) -> None:
    """Print the rows of an evaluation, such as one per class, then a line of totals."""
    if result.rows:
        table = Table(*result.rows[0])
        for column in table.columns[1:]:
            column.justify = "right"
        for row in result.rows:
            table.add_row(*map(cell, row.values()))
        console.print(table)
    figures = [
        f"{metric.label.removeprefix('val ')} {metric.format(result.metrics[metric.key])}"
        for metric in metrics
    ]
    unreadable = f", {result.unreadable} unreadable" if result.unreadable else ""
    console.print(
        f"{plain(path)}: {'  '.join(figures)}  ({result.samples} images{unreadable})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
