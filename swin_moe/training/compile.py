"""``train.compile``: the graphs of a model's blocks, compiled and measured before training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..common.host import keep_graphs
from ..common.ranks import hostname, local_world_size
from ..distributed import all_reduce_
from ..distributed.watchdog import START, Watchdog
from ..models.graphs import BlockGraphs
from ..tasks import Task
from .engine import Engine
from .precision import in_precision
from .run_directory import Run

log = logging.getLogger("swin_moe")

_GAIN = 1.02  # graphs must be faster by this factor; less is noise


def compile_blocks(run: Run, task: Task, engine: Engine, watchdog: Watchdog) -> None:
    """Compile the blocks if ``train.compile`` says so; every rank must call it.

    The model's weights, the optimizer, statistics and torch's generators do not change. If the
    compiler fails on a rank, its blocks stay as they are. ``auto`` keeps the graphs where they are
    faster on all ranks.
    """
    wanted = task.config.train.compile
    if not wanted or engine.stage == 3:
        return
    graphs = BlockGraphs(engine.model, _failed)
    if not graphs.graphs:
        run.say("compile: off, for model.use_checkpoint=offload runs its blocks without graphs")
        return
    run.say("compiling the blocks, which may take minutes; later starts reuse the graphs")
    with watchdog.phase("the blocks were compiled", works=True, limits=START):
        world = run.world
        trial = _try(graphs, task, engine, measure=wanted == "auto")
        figures = torch.tensor([trial.speedup, -float(bool(trial.problem))], device=world.device)
        speedup, worst = all_reduce_(figures, "min").tolist()
    keep = speedup > _GAIN if wanted == "auto" else not trial.problem
    if not keep:
        graphs.detach()
    if trial.problem:
        log.warning("compile: off, because the compiler failed: %s", trial.problem)
    elif worst and wanted == "auto":
        run.say("compile: off, because the compiler failed on another rank (its log says why)")
    else:
        measured = f", {speedup:.2f}× eager (measured)" if wanted == "auto" else ""
        run.say(f"compile: {'on' if keep else 'off'}{measured}, {trial.seconds:.0f} s to compile")


class _Trial(NamedTuple):
    """The result of compiling: seconds, speed-up over eager blocks, and the error or ""."""

    seconds: float
    speedup: float = 0.0
    problem: str = ""


def _try(graphs: BlockGraphs, task: Task, engine: Engine, measure: bool) -> _Trial:
    world = engine.world
    # Its warning, that a host with CUDA's toolkit has no GPU, is no news.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    keep_graphs(hostname() if world.size > local_world_size() else "")
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _in_training(engine):
        began = time.monotonic()
        if engine.world.expert.size > 1:  # all ranks exchange rows: an error must end them all
            _record(graphs, task, engine)
        try:
            if engine.world.expert.size == 1:
                _record(graphs, task, engine)
            with _precision(engine):
                graphs.compile()
                seconds = time.monotonic() - began
                return _Trial(seconds, graphs.speedup() if measure else 1.0)
        except Exception as error:  # any fault of the compiler, or of the code that it made
            log.info("compile: the error was", exc_info=error)
            return _Trial(time.monotonic() - began, problem=_first_line(error))
        finally:
            _end_workers()


def _record(graphs: BlockGraphs, task: Task, engine: Engine) -> None:
    """Run a forward pass as in training; with experts on several ranks, all take part."""
    batch = task.example_batch(task.config.data.batch_size, engine.world.device)
    forward = in_precision(engine.model, engine.dtype, cast_weights=engine.stage > 0)
    with graphs.recording():
        forward(batch.inputs)


@contextlib.contextmanager
def _in_training(engine: Engine) -> Iterator[None]:
    mode = engine.model.training
    engine.model.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        engine.model.train(mode)


def _precision(engine: Engine) -> contextlib.AbstractContextManager[Any]:
    """Return the context of the engine's forward pass; graphs depend on it."""
    if engine.stage == 0 and engine.dtype != torch.float32:
        return torch.autocast(engine.world.device.type, dtype=engine.dtype)
    return contextlib.nullcontext()


def _failed(error: Exception) -> None:
    log.warning("compile: off from here on, because the compiler failed: %s", _first_line(error))
    log.info("compile: the error was", exc_info=error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return f"{line}: install g++, or set CXX" if "No working C++ compiler" in line else line


def _end_workers() -> None:
    """End the compiler's processes; a later graph starts them again."""
    with contextlib.suppress(Exception):
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()
