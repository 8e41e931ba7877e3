"""One run: build its parts from the config, train, and end it."""

from __future__ import annotations

import gc
import logging
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from . import checkpoint, distributed, ops, preflight
from .common import ranks
from .common.errors import Preempted, TrainingError
from .common.signals import StopSignal
from .common.text import plain
from .config import Config, idle_keys, share_global_batch
from .data import Loader
from .distributed import World
from .distributed.watchdog import START, Watchdog
from .models.cost import count
from .models.swin import FAMILIES
from .moe import lost_gate
from .reporting import tables
from .reporting.contact_sheet import contact_sheet
from .reporting.metric_log import MetricLog
from .reporting.plots import draw_summary, show_picture
from .reporting.profiler import Profile, peak_flops
from .tasks import Task, build_task
from .training.assembly import build_engine, tune_overlap
from .training.auto_batch import resolve_micro_batch
from .training.checkpointer import Checkpointer, global_batch
from .training.compile import compile_blocks
from .training.engine import Engine
from .training.inputs import Inputs, list_bad_samples, open_inputs
from .training.kernels import settle
from .training.optim import build_schedule
from .training.precision import resolve_precision, set_numerics
from .training.progress import Position, TrainingPlan
from .training.run_directory import Run, keep_former_defaults, prepare_folder, step_back
from .training.trainer import RollBack, Trainer
from .weights.pretrained import Pretrained

log = logging.getLogger("swin_moe")


@dataclass
class Session:
    """The parts of a run that outlive an engine: a roll-back builds a new engine."""

    run: Run
    task: Task
    plan: TrainingPlan
    loaders: list[Loader]
    stop_signal: StopSignal
    checkpointer: Checkpointer
    watchdog: Watchdog
    log: MetricLog | None
    profile: Profile | None


def train(
    config: Config,
    world: World,
    console: Console,
    watchdog: Watchdog,
    fresh: bool = False,
    verdict: preflight.Agreement | None = None,
    accept_changes: bool = False,
) -> Path:
    """Train by the config, from the last checkpoint of its run directory if there is one.

    Args:
        watchdog: watches already, and goes on until the training has ended.
        fresh: start from the beginning; an existing run directory is moved aside.
        verdict: the agreement of the processes; None skips the rest of the preflight.
        accept_changes: resume although data or classes have changed.

    Returns:
        the run directory.

    Raises:
        ValueError, TrainingError: one line for the user.
        Preempted: a signal ended the training, and the checkpoint is written.
    """
    started = time.monotonic()
    fresh = fresh and not ranks.started_again()  # a restart resumes the fresh run
    run = Run(Path(config.train.output), world, console)
    with StopSignal() as stop_signal:
        task = _prepare(run, config, watchdog, verdict)
        keep_former_defaults(run, config, fresh)
        watchdog.enter(f"data.path={plain(config.data.path)} was opened", works=True)
        resolve_micro_batch(run, task, fresh)
        inputs = open_inputs(run, task, fresh)
        watchdog.enter(f"the checkpoints in {plain(run.folder)} were read", works=True)
        reader = prepare_folder(run, config, fresh, inputs.loaders[0], accept_changes)
        watchdog.writing.good = "" if reader is None else str(reader.path)
        watchdog.log_to(run.log_file)
        watchdog.enter("the model and its optimizer were built", works=True)
        session = _open_session(run, task, inputs, reader, stop_signal, watchdog)
        _report_start(run, config)
        try:
            trainer = _assemble(session, reader, inputs.source)
            del inputs  # its weights are as large as the model
            _show_data(session, reader)
            stop_signal.defer()
            trainer = fit(session, trainer)
        finally:
            watchdog.stop()
            if session.profile:
                session.profile.close()
            _draw_summary(session)
    if world.is_main:
        console.print(tables.closing(run.folder, trainer.result(), time.monotonic() - started))
    trainer.engine.close()
    for loader in session.loaders:
        loader.close()
    return run.folder


def _prepare(
    run: Run, config: Config, watchdog: Watchdog, verdict: preflight.Agreement | None
) -> Task:
    """Choose ops, build and check the task, share the global batch, and finish the preflight."""
    world = run.world
    if not config.ops.fused:
        ops.use_references()
    if config.ops.require_fused:
        ops.require_fused(world.device.type)
    task = build_task(config, world.rank)
    task.check()
    set_numerics(config, world.device)
    if note := share_global_batch(config, world.size):
        run.say(note)
    if verdict is not None:
        dtype = resolve_precision(config.precision, world.device)
        watchdog.enter("the links between the processes were timed", works=True)
        preflight.at_start(config, verdict, world, dtype, run.say)
    if config.ops.fused:
        watchdog.enter("the kernels were tried on this machine", works=True)
        settle(task, world, resolve_precision(config.precision, world.device), run.say)
    return task


def _open_session(
    run: Run,
    task: Task,
    inputs: Inputs,
    reader: checkpoint.Reader | None,
    stop_signal: StopSignal,
    watchdog: Watchdog,
) -> Session:
    list_bad_samples(run, inputs.loaders)
    plan, loaders = inputs.plan, inputs.loaders
    return Session(
        run=run,
        task=task,
        plan=plan,
        loaders=loaders,
        stop_signal=stop_signal,
        checkpointer=Checkpointer(run, task, plan, loaders[0], watchdog.writing),
        watchdog=watchdog,
        log=_open_log(run, task.config, reader),
        profile=_profile(run, task) if task.config.train.profile else None,
    )


def _open_log(run: Run, config: Config, reader: checkpoint.Reader | None) -> MetricLog | None:
    if not run.world.is_main:
        return None
    resume_step = None if reader is None else int(reader.state["position"]["step"])
    return MetricLog(run.folder, config.log.tensorboard, resume_step)


def _profile(run: Run, task: Task) -> Profile:
    """Open a profile; model FLOPs are 6 per multiply-accumulate: 2 forward and 4 backward."""
    config = task.config
    images = config.data.batch_size * config.train.micro_steps
    flops = 6.0 * count(config.model, config.moe).macs * images
    dtype = resolve_precision(config.precision, run.world.device)
    peak = peak_flops(run.world.device, dtype, config.precision.tf32)
    return Profile(run.folder / "profile", run.world, run.console, flops, peak)


def _report_start(run: Run, config: Config) -> None:
    """Print warnings about the config, and log where this rank runs."""
    post_norm = FAMILIES[config.model.family].post_norm
    world = run.world
    dtype = resolve_precision(config.precision, world.device)
    idle = ""
    if config.precision.tf32 and (world.device.type != "cuda" or dtype != torch.float32):
        idle = "without effect: precision.tf32, which is for fp32 on a GPU"
    for warning in filter(None, (lost_gate(config.moe, post_norm), idle_keys(config), idle)):
        run.say(f"warning: {warning}")
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
    if world.binding:
        log.info("rank %d is %s", world.rank, world.binding)
    restart, allowed = ranks.restarts()
    if restart:
        run.say(f"started again by the launcher after a failure ({restart} of {allowed})")


def _assemble(
    session: Session,
    reader: checkpoint.Reader | None,
    source: Pretrained | None = None,
    place: Position | None = None,
) -> Trainer:
    """Build model, engine and trainer from the config or a checkpoint.

    Args:
        source: pretrained weights, if there is no checkpoint.
        place: the position at a roll-back, which keeps its place in the data.
    """
    run, task, world = session.run, session.task, session.run.world
    config = task.config
    distributed.seed_everything(config.train.seed)
    engine, loaded = build_engine(task, world, reader, source)
    position = Position()
    if reader is not None:
        position = session.checkpointer.restore(reader, engine, place)
    if world.is_main and place is None:
        cost = count(config.model, config.moe, task.build_model)
        header = tables.header(config, run.folder, world, engine.dtype, cost, session.loaders)
        run.console.print(header)
    if source is not None:
        run.say(f"started from {config.model.pretrained}: {loaded}")
    if reader is not None:
        epoch = min(position.epoch + 1, session.plan.epochs)
        verb = "resumed from" if place is None else "went back to"
        run.say(f"{verb} {reader.path.name} (epoch {epoch}, step {position.step})")
    tune_overlap(run, config, engine)
    compile_blocks(run, task, engine, session.watchdog)
    trainer = _build_trainer(session, engine, position, went_back=place is not None)
    # Last, because everything above may draw random numbers.
    distributed.seed_everything(config.train.seed, world.rank)
    if reader is not None and not reader.restore_rng(world.rank):
        log.warning("the checkpoint has no generator state for rank %d", world.rank)
    return trainer


def _build_trainer(
    session: Session, engine: Engine, position: Position, went_back: bool
) -> Trainer:
    run, plan, config = session.run, session.plan, session.task.config
    batch = global_batch(config, run.world)
    return Trainer(
        plan=plan,
        engine=engine,
        schedule=build_schedule(engine.optimizer, config.schedule, plan.updates_per_epoch, batch),
        train_loader=session.loaders[0],
        eval_loader=session.loaders[1],
        task=session.task,
        world=run.world,
        log=session.log,
        save=partial(session.checkpointer.save, engine),
        saver=session.checkpointer.writer,
        faults=config.faults,
        watchdog=session.watchdog,
        stop_signal=session.stop_signal,
        say=run.say,
        position=position,
        went_back=went_back,
        profile=session.profile,
    )


def fit(session: Session, trainer: Trainer) -> Trainer:
    """Train to the end, with roll-backs to earlier checkpoints; return the last trainer."""
    writer = session.checkpointer.writer
    while True:
        try:
            trainer.fit()
            return trainer
        except RollBack:
            place, from_start = trainer.position, trainer.updates_made == 0
        except (TrainingError, Preempted):  # on all ranks
            with session.watchdog.phase("the other ranks ended", writes=True):
                writer.wait()
                distributed.barrier()  # or another rank's end would end rank 0 before its report
            raise
        except BaseException:
            # Several workers may die at once; another SIGCHLD would raise again here.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            writer.close()
            raise
        with session.watchdog.phase("the save before the way back was awaited", writes=True):
            writer.wait()
        with session.watchdog.phase("an earlier checkpoint was read", works=True, limits=START):
            trainer.engine.close()
            vars(trainer).clear()  # the caller holds the trainer: free its model and optimizer
            gc.collect()
            if session.run.world.device.type == "cuda":
                torch.cuda.empty_cache()
            # A checkpoint from which no update succeeded is set aside.
            trainer = _assemble(
                session, step_back(session.run, passed_over=from_start), place=place
            )


def _show_data(session: Session, reader: checkpoint.Reader | None) -> None:
    """Draw the model's first inputs into the run directory and TensorBoard."""
    if session.log is not None and reader is None:
        path = session.run.folder / "data.png"
        draw = partial(contact_sheet, session.task, session.loaders[0], session.loaders[1], path)
        show_picture(session.log, "data/first_batches", path, draw)


def _draw_summary(session: Session) -> None:
    """Draw ``summary.png``, also of a failed run, and close the log."""
    if session.log is not None:
        folder = session.run.folder
        draw = partial(draw_summary, folder, session.task.metrics)
        show_picture(session.log, "summary", folder / "summary.png", draw)
        session.log.close()
