"""One run: its directory, and the parts built from the config."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from . import checkpoint, distributed, ops, report
from .config import Config, ConfigError, dump_config, load_config
from .data import Loader, build_loader, build_mixing
from .distributed import World, broadcast_object
from .engine import Engine, resolve_precision
from .evaluation import Evaluation, evaluate
from .metrics import MetricLog
from .models import SwinTransformer, build, expert_parameter_names
from .models.cost import count
from .models.pretrained import (
    Pretrained,
    adopt_pretrained_window,
    built_windows,
    load_pretrained,
    read_pretrained,
)
from .optim import build_schedule
from .summary import draw_summary
from .trainer import Plan, Position, Trainer, TrainingError

log = logging.getLogger("swin_moe")

MARKER = ".swin_moe"  # in every run directory: nothing else is ever moved or written over
_held: list[IO[str]] = []


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
    _check(config, world)
    torch.set_flush_denormal(config.precision.flush_denormals)
    run = Run(Path(config.train.output), world, console)
    # All input is checked before anything is written.
    loaders = [_build_loader(config, world, training) for training in (True, False)]
    plan = _plan(config, loaders[0])
    distributed.seed_everything(config.train.seed)
    source = _starting_weights(run, config, fresh)
    model = build(config.model, config.moe, world.expert)
    started_from = load_pretrained(model, source) if source else ""
    reader = _prepare_folder(run, config, fresh)
    if reader is not None:
        names = expert_parameter_names(model)
        checkpoint.load_weights(model, reader, names, _experts(config, world).start)
    engine = _build_engine(config, model, world)
    position = Position() if reader is None else _restore(reader, engine, config, world, plan)
    _log_place(world)
    cost = count(config.model, config.moe)
    if world.is_main:
        console.print(report.header(config, run.folder, world, engine.dtype, cost, loaders))
    if source is not None:
        run.say(f"started from {config.model.pretrained}: {started_from}")
    if reader is not None:
        where = f"epoch {min(position.epoch + 1, plan.epochs)}, step {position.step}"
        run.say(f"resumed from {reader.path.name} ({where})")
    trainer = _build_trainer(run, config, plan, engine, loaders, position, reader is not None)
    # Last, for everything above may draw.
    distributed.seed_everything(config.train.seed, world.rank)
    if reader is not None and not reader.restore_rng(world):
        log.warning("the checkpoint has no generator state for rank %d", world.rank)
    _fit(run, trainer)
    if world.is_main:
        console.print(report.closing(run.folder, trainer, time.monotonic() - started))
    engine.close()
    for loader in loaders:
        loader.close()
    return run.folder


def _log_place(world: World) -> None:
    log.info(
        "rank %d of %d on %s (%s), expert rank %d of %d, torch %s",
        world.rank,
        world.size,
        distributed.hostname(),
        world.device,
        world.expert.rank,
        world.expert.size,
        torch.__version__,
    )


def _starting_weights(run: Run, config: Config, fresh: bool) -> Pretrained | None:
    """Weights of ``model.pretrained``; none where a checkpoint of the run goes on instead.

    Sets ``model.pretrained_window_sizes`` to the file's windows where the config leaves them open,
    and keeps that choice when the run is resumed.
    """
    if not config.model.pretrained:
        return None
    for path in [] if fresh else checkpoint.list_checkpoints(run.checkpoints):
        if (path / "config.yaml").is_file():
            saved = _load_saved_config(path).model.pretrained_window_sizes
            stated = config.model.pretrained_window_sizes
            config.model.pretrained_window_sizes = stated or saved
            return None
    source = read_pretrained(Path(config.model.pretrained))
    config.model = adopt_pretrained_window(config.model, source)
    return source


def _check(config: Config, world: World) -> None:
    """What can be refused before anything is built."""
    if config.model.num_classes == 0:
        raise ValueError("model.num_classes=0: training needs at least one class")
    if not config.ops.fused:
        ops.use_references()
    if config.ops.allow_unverified:
        ops.allow_unverified()
    if config.ops.require_fused:
        ops.require_fused(world.device.type)


def _build_engine(config: Config, model: SwinTransformer, world: World) -> Engine:
    return Engine(
        model,
        world,
        optimizer=config.optimizer,
        zero=config.zero,
        dtype=resolve_precision(config.precision, world.device),
        micro_batch=config.data.batch_size,
        accumulation_steps=config.train.accumulation_steps,
    )


def _build_trainer(
    run: Run,
    config: Config,
    plan: Plan,
    engine: Engine,
    loaders: list[Loader],
    position: Position,
    resumed: bool,
) -> Trainer:
    world = run.world
    metric_log = None
    if world.is_main:
        resume_step = position.step if resumed else None
        metric_log = MetricLog(run.folder, config.log.tensorboard, resume_step)
    batch = _global_batch(config, world)
    return Trainer(
        plan=plan,
        engine=engine,
        schedule=build_schedule(engine.optimizer, config.schedule, plan.updates_per_epoch, batch),
        train_loader=loaders[0],
        eval_loader=loaders[1],
        mixing=build_mixing(
            config.augment, config.model.num_classes, config.train.seed, world.rank
        ),
        world=world,
        log=metric_log,
        save=partial(_save, run, config, engine),
        say=run.say,
        position=position,
    )


def _build_loader(config: Config, world: World, training: bool) -> Loader:
    return build_loader(
        config.data,
        config.augment,
        image_sides=config.model.image_sides,
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


def _global_batch(config: Config, world: World) -> int:
    """Images per update."""
    return config.data.batch_size * config.train.accumulation_steps * world.size


def _experts(config: Config, world: World) -> range:
    """Global indices of the experts that this rank holds."""
    num_local = config.moe.num_experts // world.expert.size
    return range(world.expert.rank * num_local, (world.expert.rank + 1) * num_local)


def _prepare_folder(run: Run, config: Config, fresh: bool) -> checkpoint.Reader | None:
    """Choose the checkpoint to resume from and write ``config.yaml``; the same on every rank."""
    chosen: str | Exception = ""
    if run.world.is_main:
        try:
            chosen = _adopt(run, fresh)
        except (ValueError, OSError) as error:  # to be raised on every rank alike
            chosen = error
    chosen = broadcast_object(chosen)
    if isinstance(chosen, Exception):
        raise chosen
    reader = checkpoint.Reader(Path(chosen)) if chosen else None
    if reader is not None:
        _check_same_model(reader, config)
    log_to_file(run.folder / "logs" / f"rank-{run.world.rank}.log")
    if run.world.is_main:
        (run.folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return reader


def _adopt(run: Run, fresh: bool) -> str:
    """Lock the run directory, move an earlier life aside if need be, choose the checkpoint.

    Returns:
        path of the checkpoint to resume from, empty if there is none.

    Raises:
        ValueError: the directory holds something else, or another training runs in it.
    """
    folder = run.folder
    marker = folder / MARKER
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise ValueError(
            f"train.output={folder} is not empty and was not made by swin-moe: choose another"
        )
    if marker.exists():
        _lock(marker)
        found = None if fresh else checkpoint.latest(run.checkpoints)
        if found is not None:
            checkpoint.set_aside_newer(run.checkpoints, found)
            return str(found)
        if fresh or (folder / "metrics.jsonl").exists():  # killed before its first checkpoint
            aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
            run.say(f"the earlier run was moved to {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    _lock(marker)
    return ""


def _lock(marker: Path) -> None:
    """Hold the marker as long as this process lives."""
    handle = marker.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another training runs in {marker.parent}: wait for it, or set another train.output"
        ) from None
    _held.append(handle)


def _check_same_model(reader: checkpoint.Reader, config: Config) -> None:
    """The checkpoint's model must be the config's; everything else may change."""
    saved = _load_saved_config(reader.path)
    for section in ("model", "moe"):
        old, new = getattr(saved, section).model_dump(), getattr(config, section).model_dump()
        shape_keys = [key for key in new if old[key] != new[key] and key in _SHAPE_KEYS]
        if shape_keys:
            key = shape_keys[0]
            raise ConfigError(
                f"{section}.{key}={new[key]!r}, but the checkpoint {reader.path} was trained with "
                f"{old[key]!r}: change it back, set another train.output, or use --fresh"
            )
    old_windows, new_windows = built_windows(saved.model), built_windows(config.model)
    if old_windows != new_windows:
        raise ConfigError(
            f"model.window_size and model.img_size give windows {new_windows}, but the checkpoint "
            f"{reader.path} has {old_windows}: change them back, or start another run from it by "
            "model.pretrained"
        )


_SHAPE_KEYS = {
    "family", "patch_size", "in_chans", "num_classes", "embed_dim", "depths", "num_heads",
    "mlp_ratio", "mlp_fc2_bias", "qkv_bias", "ape", "patch_norm", "extra_norm_every_n_blocks",
    "pretrained_window_sizes", "blocks", "num_experts", "router", "cosine_router_dim", "fc2_bias",
}  # fmt: skip


def _load_saved_config(path: Path) -> Config:
    return load_config(path / "config.yaml")


def _convert_position(position: Position, old_batch: int, new_batch: int, plan: Plan) -> None:
    """Keep the place in the epoch when the global batch has changed since."""
    if old_batch == new_batch:
        return
    position.update = min(position.update * old_batch // new_batch, plan.updates_per_epoch - 1)
    log.warning(
        "the global batch was %d and is %d: rates follow it, and epoch %d goes on at update %d",
        old_batch,
        new_batch,
        position.epoch + 1,
        position.update,
    )


def _restore(
    reader: checkpoint.Reader, engine: Engine, config: Config, world: World, plan: Plan
) -> Position:
    position = Position(**reader.state["position"])
    _convert_position(position, reader.state["global_batch"], _global_batch(config, world), plan)
    names = expert_parameter_names(engine.model)
    experts = _experts(config, world)

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
        num_local_experts=len(_experts(config, world)),
        state={"position": position.state(), "global_batch": _global_batch(config, world)},
        config_text=dump_config(config),
        world=world,
    )
    if world.is_main:
        best = run.checkpoints / f"step-{position.best_step:08d}"
        checkpoint.prune(run.checkpoints, config.checkpoint.keep_last, best)
    log.debug("wrote %s", path)


def _fit(run: Run, trainer: Trainer) -> None:
    """Train, and draw what came of it even if that failed."""
    try:
        try:
            trainer.fit()
        finally:
            _finish_pictures(run, trainer)
    except TrainingError:
        distributed.barrier()  # of all: the end of another would end rank 0 before it has told
        raise


def _finish_pictures(run: Run, trainer: Trainer) -> None:
    if trainer.log is None:
        return
    try:
        picture = draw_summary(run.folder)
        if picture is not None:
            trainer.log.image("summary", picture, trainer.position.step)
    except Exception as error:  # never in the way of the error that ended the training
        log.warning("summary.png could not be drawn: %s", error)
    trainer.log.close()


# --------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True)
class Opened:
    """A checkpoint, ready to be asked: its own folder, and ``model`` called by ``forward``."""

    path: Path
    config: Config
    model: SwinTransformer
    forward: Callable[[torch.Tensor], Any]
    loader: Loader


def open_checkpoint(path: Path, world: World, overrides: list[str], command: str) -> Opened:
    """The last checkpoint of a run directory, or a checkpoint folder, with its held-out data.

    Raises:
        ValueError: nothing there can be evaluated, or there are several processes.
    """
    if world.size > 1:
        raise ValueError(f"{command} runs as one process: start it without a launcher")
    found: Path | None = path
    if not (path / "manifest.json").exists():
        found = checkpoint.latest(path / "checkpoints")
        if found is None:
            raise ValueError(f"{path}: neither a checkpoint nor a run directory that holds one")
    assert found is not None
    source = read_pretrained(found)
    config = load_config(found / "config.yaml", overrides)
    torch.set_flush_denormal(config.precision.flush_denormals)
    if config.model.num_classes != source.config.model.num_classes:
        raise ConfigError(
            f"model.num_classes={config.model.num_classes}, but {found} was trained for "
            f"{source.config.model.num_classes}: its head cannot be evaluated"
        )
    config.model = adopt_pretrained_window(config.model, source)
    with torch.random.fork_rng(devices=[]):
        model = build(config.model, config.moe)
    load_pretrained(model, source)
    model.eval().to(world.device)
    dtype = resolve_precision(config.precision, world.device)
    forward = _inference(model, dtype, cast_weights=config.zero.stage > 0)
    return Opened(found, config, model, forward, _build_loader(config, world, training=False))


def evaluate_checkpoint(
    path: Path, world: World, console: Console, overrides: list[str]
) -> Evaluation:
    """Evaluate a checkpoint on one process, see :func:`open_checkpoint`."""
    opened = open_checkpoint(path, world, overrides, "evaluate")
    classes = opened.config.model.num_classes
    result = evaluate(opened.forward, opened.loader, classes, world.device)
    report.print_evaluation(console, opened.path.resolve(), result, opened.loader.class_names)
    opened.loader.close()
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


def log_to_file(path: Path) -> None:
    """Send everything that is logged by this rank to ``path`` as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.DEBUG)
