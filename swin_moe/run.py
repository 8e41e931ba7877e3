"""One run: its directory, the parts built from the config, the header and the closing table."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import checkpoint, distributed, ops
from .config import Config, ConfigError, dump_config, load_config
from .data import Loader, build_loader, build_mixing
from .distributed import World, broadcast_object
from .engine import Engine, resolve_precision
from .evaluation import Evaluation, evaluate
from .metrics import MetricLog, draw_summary
from .models import SwinTransformer, build, expert_parameter_names
from .models.cost import Cost, count
from .optim import build_schedule
from .trainer import Plan, Position, Trainer

log = logging.getLogger("swin_moe")


@dataclass
class Run:
    """A run directory and the console of rank 0."""

    folder: Path
    world: World
    console: Console

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def say(self, text: str) -> None:
        """Print a line on rank 0 and put it into this rank's log."""
        if self.world.is_main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        log.debug(text)


# --------------------------------------------------------------------------------------------
# Training


def train(config: Config, world: World, console: Console, fresh: bool = False) -> Path:
    """Train as the config says, from the last checkpoint of its run directory if there is one.

    Args:
        fresh: start anew; an existing run directory is moved aside, never overwritten.

    Returns:
        the run directory.

    Raises:
        ValueError, TrainingError: one line for the user.
    """
    started = time.monotonic()
    distributed.check_world(
        world.size, config.parallel.expert_parallel_size, config.moe.num_experts
    )
    if config.ops.require_fused:
        ops.require_fused(world.device.type)
    torch.set_flush_denormal(config.precision.flush_denormals)
    run = Run(Path(config.train.output), world, console)
    # All input is checked before anything is written.
    train_loader = _build_loader(config, world, training=True)
    eval_loader = _build_loader(config, world, training=False)
    plan = _plan(config, train_loader)
    distributed.seed_everything(config.train.seed)
    model = build(config.model, config.moe, world.expert)
    reader = _prepare_folder(run, config, fresh)
    if reader is not None:
        names = expert_parameter_names(model)
        checkpoint.load_weights(model, reader, names, _first_expert(config, world))
    dtype = resolve_precision(config.precision, world.device)
    engine = Engine(
        model,
        world,
        optimizer=config.optimizer,
        zero=config.zero,
        dtype=dtype,
        micro_batch=config.data.batch_size,
        accumulation_steps=config.train.accumulation_steps,
    )
    position = Position() if reader is None else _restore(reader, engine, config, world)
    _print_header(run, config, dtype, count(config.model, config.moe), train_loader, eval_loader)
    metric_log = None
    if world.is_main:
        resume_step = None if reader is None else position.step
        metric_log = MetricLog(run.folder, config.log.tensorboard, resume_step)
    if reader is not None:
        run.say(
            f"resumed from {reader.path.name} (epoch {position.epoch + 1}, step {position.step})"
        )
    global_batch = config.data.batch_size * config.train.accumulation_steps * world.size
    trainer = Trainer(
        plan=plan,
        engine=engine,
        schedule=build_schedule(
            engine.optimizer, config.schedule, plan.updates_per_epoch, global_batch
        ),
        train_loader=train_loader,
        eval_loader=eval_loader,
        mixing=build_mixing(
            config.augment, config.model.num_classes, config.train.seed, world.rank
        ),
        world=world,
        log=metric_log,
        save=partial(_save, run, config, engine),
        say=run.say,
        position=position,
    )
    distributed.seed_everything(config.train.seed, world.rank)
    if reader is not None and not reader.restore_rng(world):
        log.warning("the checkpoint has no generator state for rank %d", world.rank)
    try:
        trainer.fit()
    finally:
        if metric_log is not None:
            _finish_pictures(run, metric_log, position.step)
    _print_closing(run, trainer, time.monotonic() - started)
    engine.close()
    return run.folder


def _build_loader(config: Config, world: World, training: bool) -> Loader:
    return build_loader(
        config.data,
        config.augment,
        img_size=config.model.img_size,
        in_chans=config.model.in_chans,
        num_classes=config.model.num_classes,
        training=training,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
    )


def _plan(config: Config, loader: Loader) -> Plan:
    accumulation = config.train.accumulation_steps
    updates = len(loader) // accumulation
    if updates == 0:
        raise ValueError(
            f"train.accumulation_steps={accumulation} is more than the {len(loader)} batches of an "
            "epoch: lower it or data.batch_size"
        )
    if config.model.num_classes == 0:
        raise ValueError("model.num_classes=0: training needs at least one class")
    return Plan(
        epochs=config.schedule.epochs,
        updates_per_epoch=updates,
        accumulation_steps=accumulation,
        eval_every_epochs=config.train.eval_every_epochs,
        save_every_epochs=config.checkpoint.every_epochs,
        save_every_steps=config.checkpoint.every_steps,
        log_every_steps=config.log.every_steps,
        max_steps=config.train.max_steps,
        num_classes=config.model.num_classes,
    )


def _first_expert(config: Config, world: World) -> int:
    return world.expert.rank * (config.moe.num_experts // world.expert.size)


def _prepare_folder(run: Run, config: Config, fresh: bool) -> checkpoint.Reader | None:
    """Choose the checkpoint to resume from and write ``config.yaml``; the same on every rank."""
    chosen: str | None = None
    if run.world.is_main:
        if fresh and run.folder.exists():
            aside = run.folder.with_name(f"{run.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            run.folder.rename(aside)
            run.say(f"--fresh: the earlier run was moved to {aside}")
        found = _try(lambda: checkpoint.latest(run.checkpoints))
        chosen = found if isinstance(found, Exception) else str(found or "")  # type: ignore[assignment]
    chosen = broadcast_object(chosen)  # type: ignore[assignment]
    if isinstance(chosen, Exception):
        raise chosen
    reader = checkpoint.Reader(Path(chosen)) if chosen else None
    if reader is not None:
        _check_same_model(reader, config)
    run.folder.mkdir(parents=True, exist_ok=True)
    log_to_file(run.folder / "logs" / f"rank-{run.world.rank}.log")
    if run.world.is_main:
        (run.folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return reader


def _try(call: Any) -> Any:
    """The call's result, or the user's error it raised, to be raised on every rank alike."""
    try:
        return call()
    except ValueError as error:
        return error


def _check_same_model(reader: checkpoint.Reader, config: Config) -> None:
    """The checkpoint's model must be the config's; everything else may change."""
    saved = _load_saved_config(reader.path)
    for section, ignored in (("model", {"name"}), ("moe", {"backend"})):
        old, new = getattr(saved, section).model_dump(), getattr(config, section).model_dump()
        shape_keys = [k for k in new if old[k] != new[k] and k in _SHAPE_KEYS and k not in ignored]
        if shape_keys:
            key = shape_keys[0]
            raise ConfigError(
                f"{section}.{key}={new[key]!r}, but the checkpoint {reader.path} was trained with "
                f"{old[key]!r}: change it back, set another train.output, or use --fresh"
            )


_SHAPE_KEYS = {
    "patch_size", "in_chans", "num_classes", "embed_dim", "depths", "num_heads", "mlp_ratio",
    "qkv_bias", "ape", "patch_norm", "blocks", "num_experts", "router", "fc2_bias",
}  # fmt: skip


def _load_saved_config(path: Path) -> Config:
    return load_config(path / "config.yaml")


def _restore(reader: checkpoint.Reader, engine: Engine, config: Config, world: World) -> Position:
    state = dict(reader.state)
    position = Position(**state["position"])
    names = expert_parameter_names(engine.model)
    first = _first_expert(config, world)
    experts = range(first, first + config.moe.num_experts // world.expert.size)

    def read(name: str, kind: str) -> torch.Tensor:
        return reader.tensor(name, kind, experts if name in names else None)

    engine.import_state(read, position.step)
    return position


def _save(run: Run, config: Config, engine: Engine, position: Position) -> None:
    world = run.world
    path = checkpoint.save(
        run.checkpoints,
        position.step,
        export=engine.export_state,
        expert_names=expert_parameter_names(engine.model),
        num_local_experts=config.moe.num_experts // world.expert.size,
        state={"position": position.state(), "world_size": world.size},
        config_text=dump_config(config),
        world=world,
    )
    if world.is_main:
        best = run.checkpoints / f"step-{position.best_step:08d}"
        checkpoint.prune(run.checkpoints, config.checkpoint.keep_last, best)
    log.debug("wrote %s", path)


def _finish_pictures(run: Run, metric_log: MetricLog, step: int) -> None:
    picture = draw_summary(run.folder)
    if picture is not None:
        metric_log.image("summary", picture, step)
    metric_log.close()


# --------------------------------------------------------------------------------------------
# Evaluation


def evaluate_checkpoint(
    path: Path, world: World, console: Console, overrides: list[str]
) -> Evaluation:
    """Evaluate a run directory's last checkpoint, or a checkpoint folder, on one process.

    Raises:
        ValueError: nothing there can be evaluated.
    """
    if world.size > 1:
        raise ValueError("evaluate runs as one process: start it without a launcher")
    found: Path | None = path
    if not (path / "manifest.json").exists():
        found = checkpoint.latest(path / "checkpoints")
        if found is None:
            raise ValueError(f"{path}: neither a checkpoint nor a run directory that holds one")
    assert found is not None
    checkpoint.verify(found)
    reader = checkpoint.Reader(found)
    config = load_config(found / "config.yaml", overrides)
    torch.set_flush_denormal(config.precision.flush_denormals)
    with torch.random.fork_rng(devices=[]):
        model = build(config.model, config.moe)
    checkpoint.load_weights(model, reader, expert_parameter_names(model), 0)
    model.eval().to(world.device)
    dtype = resolve_precision(config.precision, world.device)
    loader = _build_loader(config, world, training=False)
    forward = _inference(model, dtype, config.zero.stage > 0)
    result = evaluate(forward, loader, config.model.num_classes, world.device)
    _print_classes(console, result, loader.class_names)
    console.print(
        f"{reader.path}: top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  "
        f"loss {result.loss:.4f}  ({sum(result.total)} images"
        + (f", {result.unreadable} unreadable)" if result.unreadable else ")"),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return result


def _inference(model: SwinTransformer, dtype: torch.dtype, cast_weights: bool) -> Any:
    """The forward pass with the precision that training evaluates in."""
    if dtype == torch.float32:
        return model
    if cast_weights:  # parameters only: buffers stay fp32, as under DeepSpeed
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return lambda images: model(images.to(dtype))

    def autocast(images: torch.Tensor) -> Any:
        with torch.autocast(images.device.type, dtype=dtype):
            return model(images)

    return autocast


# --------------------------------------------------------------------------------------------
# What a person sees


def log_to_file(path: Path) -> None:
    """Send everything that is logged by this rank to ``path`` as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    logging.getLogger("swin_moe").setLevel(logging.DEBUG)


def _print_header(
    run: Run, config: Config, dtype: torch.dtype, cost: Cost, train: Loader, val: Loader
) -> None:
    world = run.world
    moe = config.moe
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("run", str(run.folder))
    shape = f"{config.model.img_size} px, window {config.model.window_size}"
    table.add_row("model", f"{config.model.name} ({shape})")
    if moe.enabled:
        layers = sum(len(blocks) for blocks in moe.blocks)
        capacity = f"capacity {moe.capacity_factor:g}" if moe.capacity_factor else "dropless"
        table.add_row(
            "experts", f"{moe.num_experts} in each of {layers} layers, top-{moe.top_k}, {capacity}"
        )
    table.add_row(
        "parameters",
        f"{cost.parameters / 1e6:.2f} M, {cost.activated / 1e6:.2f} M activated; "
        f"{cost.macs / 1e9:.3f} GMACs an image",
    )
    table.add_row("data", f"{train.description}\n{val.description}")
    table.add_row(
        "world",
        f"{world.size} processes = {world.expert_data.size} data × {world.expert.size} expert "
        f"parallel, on {_device_name(world)}",
    )
    batch = config.data.batch_size * config.train.accumulation_steps * world.size
    steps = f" × {config.train.accumulation_steps} steps" * (config.train.accumulation_steps > 1)
    table.add_row("batch", f"{batch} = {config.data.batch_size} × {world.size} processes{steps}")
    offload = f", offload to {config.zero.offload}" if config.zero.offload != "none" else ""
    table.add_row("ZeRO", f"stage {config.zero.stage}{offload}")
    weights = "bf16 weights, fp32 masters" if config.zero.stage else "autocast over fp32 weights"
    table.add_row("precision", "fp32" if dtype == torch.float32 else f"bf16 ({weights})")
    status = ops.status()
    table.add_row("ops", ", ".join(f"{name}: {kind}" for name, kind in status.items()))
    if world.is_main:
        run.console.print(table)


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU ({torch.get_num_threads()} threads each, {os.cpu_count()} cores)"


def _print_closing(run: Run, trainer: Trainer, seconds: float) -> None:
    table = Table(title="done", title_justify="left", show_header=False)
    result, position = trainer.last_evaluation, trainer.position
    if result is not None:
        best = f"{position.best_top1:.2f} % at step {position.best_step}"
        table.add_row("top-1", f"{result.top1:.2f} % (best {best})")
    table.add_row("time", f"{seconds / 60:.1f} min, {trainer.images_per_second:.0f} images/s")
    if position.unreadable:
        table.add_row("unreadable", f"{position.unreadable} images were skipped; see the log")
    table.add_row("picture", str(run.folder / "summary.png"))
    table.add_row("checkpoint", str(run.checkpoints / "last"))
    table.add_row("metrics", str(run.folder / "metrics.jsonl"))
    table.add_row("logs", str(run.folder / "logs"))
    table.add_row("curves", f"tensorboard --logdir {run.folder}")
    table.add_row("again", f"swin-moe evaluate {run.folder}")
    if run.world.is_main:
        run.console.print(table)


def _print_classes(console: Console, result: Evaluation, names: list[str] | None) -> None:
    table = Table("class", "images", "top-1")
    table.columns[1].justify = table.columns[2].justify = "right"
    for index, (correct, total) in enumerate(zip(result.correct, result.total, strict=True)):
        if total:
            name = names[index] if names else str(index)
            table.add_row(name, str(total), f"{100 * correct / total:.1f} %")
    console.print(table)
