"""The largest micro-batch that fits into memory, found by trial: ``train.accumulation_steps=auto``.

Each process tries by itself, with no collective in which another could be left waiting: a model of
its own, with as many experts as it will hold, goes forward and backward while blocks as large as
what DeepSpeed will hold beside it are taken.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

import psutil
import torch

from .config import Config
from .distributed import World, all_reduce_, local_world_size
from .engine import reserved_bytes, resolve_precision
from .models import SwinTransformer, build, split_output
from .opened import in_precision

_MARGIN = 0.08  # of the memory, for what no trial shows: fragments, the libraries' workspaces
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")


def choose_micro_batch(config: Config, world: World, available: int | None = None) -> None:
    """Cut ``data.batch_size`` into the fewest micro-batches that fit; sets both config keys.

    Args:
        available: bytes that this process may take; default: all that the device has free, on a
            CPU its share of the host's memory.

    Raises:
        ValueError: not even the smallest fits.
    """
    whole = config.data.batch_size
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    sizes = [n for n in range(whole, 0, -1) if whole % n == 0 and not (mixes and n % 2)]
    size = next((n for n in sizes if _fits(config, world, n, available)), 0)
    size = int(all_reduce_(torch.tensor(float(size), device=world.device), "min"))
    if size == 0:
        raise ValueError(
            f"train.accumulation_steps=auto: not even a micro-batch of {sizes[-1]} fits "
            "into memory: set model.use_checkpoint=true, a higher zero.stage, zero.offload=cpu or "
            "more parallel.expert_parallel_size"
        )
    config.train.accumulation_steps = whole // size
    config.data.batch_size = size


def _fits(config: Config, world: World, size: int, available: int | None) -> bool:
    try:
        with torch.random.fork_rng(), _silence(), _limit(world, available) as total:
            _try(config, world, size, total)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in _OUT_OF_MEMORY):
            raise
        return False
    finally:
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _try(config: Config, world: World, size: int, total: int) -> None:
    """One forward and backward pass of ``size`` images; raises if memory runs out."""
    model = _model_of_one(config, world)
    dtype = resolve_precision(config.precision, world.device)
    held = reserved_bytes(config.zero, model, dtype, world)
    blocks = [torch.empty(held + int(_MARGIN * total), dtype=torch.uint8, device=world.device)]
    forward = in_precision(model.train(), dtype, cast_weights=config.zero.stage > 0)
    images = torch.randn(size, config.model.in_chans, *config.model.image_sides)
    logits, routed = split_output(forward(images.to(world.device)))
    loss = logits.float().square().mean()
    (loss if routed is None else loss + routed.aux_loss).backward()
    del blocks


def _model_of_one(config: Config, world: World) -> SwinTransformer:
    """A whole model with the experts of one process, each of which gets as many tokens."""
    moe = config.moe
    experts = max(moe.num_experts // world.expert.size, moe.top_k, 1)
    moe = moe.model_copy(update={"num_experts": experts, "eval_top_k": 0})
    return build(config.model, moe).to(world.device)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Compiled ops print the stack of what they raise, which is no news here."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextlib.contextmanager
def _limit(world: World, available: int | None) -> Iterator[int]:
    """Bytes that may be taken; on a CPU, taking more fails instead of ending the process."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        fraction = min((available or free) / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, world.device)
        try:
            yield available or free
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, world.device)
        return
    import resource  # not on Windows

    if available is None:
        available = psutil.virtual_memory().available // local_world_size()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (used + available, hard))
    try:
        yield available
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
