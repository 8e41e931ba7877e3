"""One run: the parts built from the config, and how it starts, goes on and ends."""

from __future__ import annotations

import gc
import hashlib
import logging
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from . import checkpoint, distributed, ops, preflight
from .checkpoint import Saved, Writer
from .common import ranks
from .common.errors import Preempted, TrainingError
from .common.signals import StopSignal
from .common.text import plain
from .config import Config, ZeroConfig, dump_config, idle_keys, share_global_batch
from .data import Loader
from .distributed import World
from .distributed.expert_placement import ExpertLayout, expert_share
from .distributed.watchdog import START, Watchdog
from .models import expert_parameter_names
from .models.build import stage_of
from .models.cost import count
from .models.sharded_init import build_in_parts
from .models.swin import FAMILIES
from .moe import MoELayer, choose_overlap, lost_gate, moe_layers, num_experts
from .reporting import tables
from .reporting.contact_sheet import contact_sheet
from .reporting.metric_log import MetricLog
from .reporting.plots import draw_summary, show_picture
from .reporting.profiler import Profile, peak_flops
from .tasks import Task, build_task
from .training.auto_batch import resolve_micro_batch
from .training.changes import data_facts
from .training.engine import Engine, cutter, largest_parameter
from .training.inputs import Inputs, list_bad_samples, open_inputs
from .training.optim import build_schedule
from .training.precision import resolve_precision
from .training.run_directory import Run, keep_former_defaults, prepare_folder, step_back
from .training.trainer import Position, RollBack, Trainer, TrainingPlan
from .weights.pretrained import Pretrained, as_it_is, load_pretrained

log = logging.getLogger("swin_moe")


@dataclass
class _Session:
    """What outlives an engine: a run that rolls back builds a new one from a checkpoint."""

    run: Run
    config: Config
    task: Task
    plan: TrainingPlan
    loaders: list[Loader]
    stop_signal: StopSignal
    writer: Writer
    watchdog: Watchdog
    log: MetricLog | None
    profile: Profile | None


def train(
    config: Config,
    world: World,
    console: Console,
    dog: Watchdog,
    fresh: bool = False,
    verdict: preflight.Agreement | None = None,
    accept_changes: bool = False,
) -> Path:
    """Train as the config says, from the last checkpoint of its run directory if there is one.

    Args:
        dog: it watches already, and goes on until the training has ended.
        fresh: start anew; an existing run directory is moved aside, never overwritten.
        verdict: of the processes, that they are alike; None leaves the rest of the preflight out.
        accept_changes: resume although the data or its classes are others.

    Returns:
        the run directory.

    Raises:
        ValueError, TrainingError: one line for the user.
        Preempted: a signal asked for an end; the checkpoint is written.
    """
    started = time.monotonic()
    fresh = fresh and not ranks.started_again()  # once is what was meant
    with StopSignal() as stop_signal:
        _choose_ops(config, world)
        task = build_task(config, world.rank)
        task.check()
        torch.set_flush_denormal(config.precision.flush_denormals)
        run = Run(Path(config.train.output), world, console)
        if note := share_global_batch(config, world.size):
            run.say(note)
        if verdict is not None:
            dtype = resolve_precision(config.precision, world.device)
            dog.enter("the links between the processes were timed", works=True)
            preflight.at_start(config, verdict, world, dtype, run.say)
        keep_former_defaults(run, config, fresh)
        dog.enter(f"data.path={plain(config.data.path)} was opened", works=True)
        resolve_micro_batch(run, task, fresh)
        inputs = open_inputs(run, task, fresh)
        dog.enter(f"the checkpoints in {plain(run.folder)} were read", works=True)
        reader = prepare_folder(run, config, fresh, inputs.loaders[0], accept_changes)
        dog.writing.good = "" if reader is None else str(reader.path)
        dog.log_to(run.log_file)
        dog.enter("the model and its optimizer were built", works=True)
        job = _job(run, task, inputs, reader, stop_signal, dog)
        _say_how_it_starts(run, config)
        try:
            trainer = _assemble(job, reader, inputs.source)
            del inputs  # its weights are as large as the model
            _show_data(job, reader)
            stop_signal.defer()
            trainer = _fit(job, trainer)
        finally:
            job.watchdog.stop()
            if job.profile:
                job.profile.close()
            _finish_pictures(job)
    if world.is_main:
        console.print(tables.closing(run.folder, trainer.result(), time.monotonic() - started))
    trainer.engine.close()
    for loader in job.loaders:
        loader.close()
    return run.folder


def _job(
    run: Run,
    task: Task,
    inputs: Inputs,
    reader: checkpoint.Reader | None,
    stop_signal: StopSignal,
    dog: Watchdog,
) -> _Session:
    list_bad_samples(run, inputs.loaders)
    return _Session(
        run=run,
        config=task.config,
        task=task,
        plan=inputs.plan,
        loaders=inputs.loaders,
        stop_signal=stop_signal,
        writer=Writer(run.checkpoints, run.world, partial(_tell_of_save, run), dog.writing),
        watchdog=dog,
        log=_open_log(run, task.config, reader),
        profile=_profile(run, task) if task.config.train.profile else None,
    )


def _say_how_it_starts(run: Run, config: Config) -> None:
    post_norm = FAMILIES[config.model.family].post_norm
    for warning in filter(None, (lost_gate(config.moe, post_norm), idle_keys(config))):
        run.say(f"warning: {warning}")
    _log_place(run.world)
    restart, allowed = ranks.restarts()
    if restart:
        run.say(f"started again by the launcher after a failure ({restart} of {allowed})")


def _assemble(
    job: _Session,
    reader: checkpoint.Reader | None,
    source: Pretrained | None = None,
    place: Position | None = None,
) -> Trainer:
    """Model, engine and trainer, from the config or a checkpoint.

    Args:
        source: weights to start from where there is no checkpoint.
        place: where to go on in the data after a roll-back, instead of the checkpoint's.
    """
    run, config, world = job.run, job.config, job.run.world
    distributed.seed_everything(config.train.seed)
    if config.zero.stage == 3 and source is None:
        model = _build_in_parts(job.task, world, reader)
    else:
        model = job.task.build_model(world.expert)
        if reader is not None:
            checkpoint.load_weights(model, reader, _layout(model, world))
    by_name = job.task.class_names if config.data.match_classes == "name" else None
    started_from = load_pretrained(job.task.backbone(model), source, by_name) if source else ""
    exact = as_it_is(model) if source else None
    engine = _build_engine(config, model, world)
    if exact is not None:
        engine.load(exact, updates=0)
    position = Position()
    if reader is not None:
        position = _restore(reader, engine, config, world, job.plan, place)
    if world.is_main and place is None:
        cost = count(config.model, config.moe, job.task.build_model)
        run.console.print(tables.header(config, run.folder, world, engine.dtype, cost, job.loaders))
    if source is not None:
        run.say(f"started from {config.model.pretrained}: {started_from}")
    if reader is not None:
        epoch = min(position.epoch + 1, job.plan.epochs)
        verb = "resumed from" if place is None else "went back to"
        run.say(f"{verb} {reader.path.name} (epoch {epoch}, step {position.step})")
    _tune_overlap(run, config, engine)
    trainer = _build_trainer(job, engine, position, went_back=place is not None)
    # Last, for everything above may draw.
    distributed.seed_everything(config.train.seed, world.rank)
    if reader is not None and not reader.restore_rng(world.rank):
        log.warning("the checkpoint has no generator state for rank %d", world.rank)
    return trainer


def _fit(job: _Session, trainer: Trainer) -> Trainer:
    """Train to the end, by way of earlier checkpoints if it must be; returns the last trainer."""
    while True:
        try:
            trainer.fit()
            return trainer
        except RollBack:
            place, from_start = trainer.position, trainer.updates_made == 0
        except (TrainingError, Preempted):  # of all ranks
            with job.watchdog.phase("the other ranks ended", writes=True):
                job.writer.wait()
                distributed.barrier()  # else another's end would end rank 0 before it has reported
            raise
        except BaseException:
            # Several workers may die at once. Each further one would raise here and in the report.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job.writer.close()
            raise
        with job.watchdog.phase("the save before the way back was awaited", writes=True):
            job.writer.wait()
        with job.watchdog.phase("an earlier checkpoint was read", works=True, limits=START):
            trainer.engine.close()
            del trainer  # or there would be two of all that it holds
            gc.collect()
            if job.run.world.device.type == "cuda":
                torch.cuda.empty_cache()
            trainer = _roll_back(job, place, from_start)


def _roll_back(job: _Session, place: Position, from_start: bool) -> Trainer:
    """Build the trainer anew from the last checkpoint, with the samples that follow.

    Args:
        from_start: it has not made one update since that checkpoint.
    """
    reader = step_back(job.run, passed_over=from_start)
    return _assemble(job, reader, place=place)


def _show_data(job: _Session, reader: checkpoint.Reader | None) -> None:
    """A picture of what the model is to see, in the run directory and in TensorBoard."""
    if job.log is not None and reader is None:
        path = job.run.folder / "data.png"
        draw = partial(contact_sheet, job.task, job.loaders[0], job.loaders[1], path)
        show_picture(job.log, "data/first_batches", path, draw)


def _log_place(world: World) -> None:
    log.info(
        "rank %d of %d on %s (%s), expert rank %d of %d, torch %s",
        world.rank,
        world.size,
        ranks.hostname(),
        world.device,
        world.expert.rank,
        world.expert.size,
        torch.__version__,
    )


def _choose_ops(config: Config, world: World) -> None:
    if not config.ops.fused:
        ops.use_references()
    if config.ops.allow_unverified:
        ops.allow_unverified()
    if config.ops.require_fused:
        ops.require_fused(world.device.type)


def _build_in_parts(task: Task, world: World, reader: checkpoint.Reader | None) -> nn.Module:
    """The model for ZeRO-3: cut module by module, it is never whole on any rank."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        outline = task.build_model(world.expert)
    layout = _layout(outline, world)

    def fill(name: str, parameter: torch.nn.Parameter) -> None:
        if reader is not None:
            checkpoint.load_weight(name, parameter, reader, layout)

    config = task.config
    dtype = resolve_precision(config.precision, world.device)
    cut = cutter(_own_files(config), world, dtype, largest_parameter(outline))
    build = partial(task.build_model, world.expert, initialise=False)
    model = build_in_parts(build, cut, fill)
    if reader is not None:
        checkpoint.load_buffers(model, reader, layout)
    return model


def _own_files(config: Config) -> ZeroConfig:
    """With a folder of this run's for what ZeRO keeps in files, the same at each start."""
    if not config.zero.uses_files:
        return config.zero
    folder = Path(config.train.output).resolve()
    name = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    return config.zero.model_copy(update={"nvme_path": str(Path(config.zero.nvme_path) / name)})


def _build_engine(config: Config, model: nn.Module, world: World) -> Engine:
    return Engine(
        model,
        world,
        optimizer=config.optimizer,
        zero=_own_files(config),
        dtype=resolve_precision(config.precision, world.device),
        micro_batch=config.data.batch_size,
        gradient_accumulation_steps=config.train.micro_steps,
    )


def _tune_overlap(run: Run, config: Config, engine: Engine) -> None:
    if config.moe.overlap_degree != "auto" or run.world.expert.size == 1:
        return
    height, width = config.model.token_grid
    stages: dict[int, list[MoELayer]] = {}
    for name, layer in moe_layers(engine.model).items():
        stages.setdefault(stage_of(name), []).append(layer)
    for stage, layers in stages.items():
        shape = (config.data.batch_size, -(-height // 2**stage), -(-width // 2**stage))
        line = choose_overlap(layers, shape, run.world.device, engine.dtype)
        run.say(f"stage {stage}: {line}")


def _open_log(run: Run, config: Config, reader: checkpoint.Reader | None) -> MetricLog | None:
    if not run.world.is_main:
        return None
    resume_step = None if reader is None else int(reader.state["position"]["step"])
    return MetricLog(run.folder, config.log.tensorboard, resume_step)


def _build_trainer(job: _Session, engine: Engine, position: Position, went_back: bool) -> Trainer:
    config, world, plan = job.config, job.run.world, job.plan
    batch = _global_batch(config, world)
    return Trainer(
        plan=plan,
        engine=engine,
        schedule=build_schedule(engine.optimizer, config.schedule, plan.updates_per_epoch, batch),
        train_loader=job.loaders[0],
        eval_loader=job.loaders[1],
        task=job.task,
        world=world,
        log=job.log,
        save=partial(_save, job, engine),
        saver=job.writer,
        faults=config.faults,
        watchdog=job.watchdog,
        stop_signal=job.stop_signal,
        say=job.run.say,
        position=position,
        went_back=went_back,
        profile=job.profile,
    )


def _profile(run: Run, task: Task) -> Profile:
    """Model FLOPs are six a multiply-accumulate: two, and twice as many in the backward pass."""
    config = task.config
    images = config.data.batch_size * config.train.micro_steps
    flops = 6.0 * count(config.model, config.moe).macs * images
    peak = peak_flops(run.world.device, resolve_precision(config.precision, run.world.device))
    return Profile(run.folder / "profile", run.world, run.console, flops, peak)


def _global_batch(config: Config, world: World) -> int:
    """Images per update."""
    return config.data.batch_size * config.train.micro_steps * world.size


def _layout(model: nn.Module, world: World) -> ExpertLayout:
    experts = num_experts(model)
    share = expert_share(experts, world.expert.rank, world.expert.size)
    return ExpertLayout(expert_parameter_names(model), experts, share)


def _convert_position(
    position: Position, state: dict[str, Any], batch: int, plan: TrainingPlan
) -> None:
    """Keep the place in the epoch if the global batch or the number of samples has changed.

    Args:
        state: of the checkpoint. batch: the global batch now.
    """
    former, updates = state["global_batch"], plan.updates_per_epoch
    length = state.get("updates_per_epoch", updates * batch // former)  # older ones lack it
    if former != batch:
        position.update = min(position.update * former // batch, updates - 1)
        what = f"the global batch was {former} and is {batch}: rates follow it, and"
    elif length != updates or position.update >= updates:
        position.update = min(position.update * updates // length, updates - 1)
        what = f"an epoch had {length:,} updates and has {updates:,}, since the data have changed:"
    else:
        return
    log.warning("%s epoch %d goes on at update %d", what, position.epoch + 1, position.update)


def _restore(
    reader: checkpoint.Reader,
    engine: Engine,
    config: Config,
    world: World,
    plan: TrainingPlan,
    place: Position | None,
) -> Position:
    position = Position.of(reader.state["position"])
    if place is None:
        batch = _global_batch(config, world)
        _convert_position(position, reader.state, batch, plan)
    else:
        made = position.step - position.skipped
        position = replace(place, skipped=place.step - made)
    layout = _layout(engine.model, world)

    def read(name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        return reader.values(name, kind, layout.share_of(name), start, stop)

    engine.load(read, updates=position.step - position.skipped)
    return position


def _save(job: _Session, engine: Engine, position: Position) -> None:
    config, world = job.config, job.run.world
    state = {
        "position": position.state(),
        "metric": job.task.metric._asdict(),
        "global_batch": _global_batch(config, world),
        "updates_per_epoch": job.plan.updates_per_epoch,
        "processes": world.size,
        "expert_parallel_size": world.expert.size,
        "zero_stage": config.zero.stage,
        "data": data_facts(job.loaders[0]) | {"folder": str(Path(config.data.path).resolve())},
    }
    job.writer.save(
        position.step,
        engine.fragments(),
        _layout(engine.model, world),
        state=state,
        config_text=dump_config(config),
        class_names=job.task.class_names,
        keep_last=config.checkpoint.keep_last,
        best_step=position.best_step,
        size=engine.saved_bytes,
    )


def _tell_of_save(run: Run, saved: Saved) -> None:
    if saved.error:
        run.say(
            f"warning: the checkpoint of step {saved.step} could not be written: {saved.error}; "
            "earlier ones are as they were, and training goes on"
        )
    else:
        log.info(
            "checkpoint of step %d: %.1f MB in %.2f s, of which training waited %.3f s",
            saved.step,
            saved.bytes / 1e6,
            saved.seconds,
            saved.stall,
        )


def _finish_pictures(job: _Session) -> None:
    """Draw what came of it, even if it failed."""
    if job.log is not None:
        folder = job.run.folder
        draw = partial(draw_summary, folder, job.task.metrics)
        show_picture(job.log, "summary", folder / "summary.png", draw)
        job.log.close()
