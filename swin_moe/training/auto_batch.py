"""The largest micro-batch that fits into memory, found by trial.

``train.gradient_accumulation_steps=auto`` asks for it.

Each process tries by itself, with no collective in which another could be left waiting: a model of
its own, with as many experts as it will hold, goes forward and backward while blocks as large as
what DeepSpeed will hold beside it are taken.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import psutil
import torch
from torch import nn

from .. import checkpoint, ops
from ..common.host import MARGIN, free_memory, silenced
from ..common.ranks import local_world_size
from ..common.text import reason
from ..config import Config, load_config, micro_batch_sizes
from ..distributed import Group, World, all_reduce_
from ..tasks import Task, build_task
from .engine import reserved_bytes
from .precision import in_precision, resolve_precision
from .run_directory import Run

# What a lack of memory sounds like; the last one is oneDNN's.
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "could not create a primitive")


def resolve_micro_batch(run: Run, task: Task, fresh: bool) -> None:
    """Resolve ``gradient_accumulation_steps=auto``; a resume on as many processes keeps it."""
    config = task.config
    if config.train.gradient_accumulation_steps != "auto":
        return
    for path in [] if fresh else checkpoint.list_checkpoints(run.checkpoints)[:1]:
        try:
            saved = load_config(path / "config.yaml")
            processes = checkpoint.Reader(path).state["processes"]
        except (ValueError, OSError, KeyError):
            break  # what is wrong with it is told when it is to be resumed from
        micro, steps = saved.data.batch_size, saved.train.micro_steps
        if processes == run.world.size and micro * steps == config.data.batch_size:
            config.data.batch_size, config.train.gradient_accumulation_steps = micro, steps
            return
    choose_micro_batch(task, run.world)
    run.say(
        f"micro-batches of {config.data.batch_size} images a process fit into memory: "
        f"{config.train.micro_steps} of them an update"
    )


def choose_micro_batch(task: Task, world: World, available: int | None = None) -> None:
    """Cut ``data.batch_size`` into the fewest micro-batches that fit; sets both config keys.

    Args:
        available: bytes that this process may take; default: all that the device has free, on a
            CPU its share of the host's memory.

    Raises:
        ValueError: not even the smallest fits.
    """
    config = task.config
    whole = config.data.batch_size
    sizes = micro_batch_sizes(config, whole)
    if available is None:
        available = _available(world)
    size = _largest(sizes, lambda n: _fits(task, world, n, available))
    size = int(all_reduce_(torch.tensor(float(size), device=world.device), "min"))
    if size == 0:
        raise ValueError(
            f"train.gradient_accumulation_steps=auto: not even a micro-batch of {sizes[-1]} fits "
            "into memory: set model.use_checkpoint=true, a higher zero.stage, "
            "zero.offload_optimizer=cpu or more parallel.expert_parallel_size"
        )
    config.train.gradient_accumulation_steps = whole // size
    config.data.batch_size = size


def _largest(sizes: list[int], fits: Callable[[int], bool]) -> int:
    """The first of the falling sizes that fits, 0 if none does; the first of all is tried first."""
    if fits(sizes[0]):
        return sizes[0]
    # The index of the last one that is too large, and of the first one that fits.
    large, small = 0, len(sizes)
    while small - large > 1:
        middle = (large + small) // 2
        if fits(sizes[middle]):
            small = middle
        else:
            large = middle
    return sizes[small] if small < len(sizes) else 0


def _fits(task: Task, world: World, size: int, available: int) -> bool:
    if world.device.type == "cpu":
        return _fits_in_a_child(task, world, size, available)
    total = torch.cuda.get_device_properties(world.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(available / total, 1.0), world.device)
    try:
        with torch.random.fork_rng([world.device]), silenced():
            _try(task, world, size, available)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _fits_in_a_child(task: Task, world: World, size: int, available: int) -> bool:
    """On a CPU in a process of its own: libraries do not always survive a lack of memory."""
    theirs, ours = multiprocessing.Pipe(duplex=False)
    expert, replicas = (
        Group(None, group.rank, group.size) for group in (world.expert, world.expert_data)
    )
    alone = replace(world, expert=expert, expert_data=replicas)
    # Its server imports once, and starts no threads that a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=_child, args=(task.config, alone, size, available, ours))
    child.start()
    ours.close()
    try:
        error = theirs.recv()
    except EOFError:  # killed
        error = None
    child.join()
    if error:
        raise ValueError(f"train.gradient_accumulation_steps=auto: the trial failed: {error}")
    return error == ""


def _child(config: Config, world: World, size: int, available: int, answer: Connection) -> None:
    """Answers with an empty text if it fits, None if it does not, else with what went wrong."""
    import resource  # not on Windows

    if not config.ops.fused:
        ops.use_references()
    used = psutil.Process().memory_info().data
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (used + available, hard))
    try:
        with silenced():
            _try(build_task(config), world, size, available)
        answer.send("")
    except MemoryError:
        answer.send(None)
    except RuntimeError as error:
        lacks = any(sign in str(error) for sign in _OUT_OF_MEMORY)
        answer.send(None if lacks else reason(error))
    except Exception as error:
        answer.send(reason(error))


def _available(world: World) -> int:
    """Bytes that this process may take of its device, or its share of the host's memory."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return free_memory() // local_world_size()


def _try(task: Task, world: World, size: int, total: int) -> None:
    """One forward and backward pass of ``size`` images; raises if memory runs out."""
    config = task.config
    model = _model_of_one(task, world)
    dtype = resolve_precision(config.precision, world.device)
    held = reserved_bytes(config.zero, config.optimizer, model, dtype, world)
    blocks = [torch.empty(held + int(MARGIN * total), dtype=torch.uint8, device=world.device)]
    forward = in_precision(model.train(), dtype, cast_weights=config.zero.stage > 0)
    _, _, loss = task.step(forward, task.example_batch(size, world.device))
    loss.backward()
    del blocks


def _model_of_one(task: Task, world: World) -> nn.Module:
    """A whole model with the experts of one process, each of which gets as many tokens."""
    moe = task.config.moe
    experts = max(moe.num_experts // world.expert.size, moe.top_k, 1)
    moe = moe.model_copy(update={"num_experts": experts, "eval_top_k": 0})
    alone = task.config.model_copy(update={"moe": moe})
    return build_task(alone).build_model().to(world.device)
