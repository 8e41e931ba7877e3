"""The kernels of a run: tried at its start, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import ops
from ..distributed import World, gather_objects
from ..models.attention import WindowAttention
from ..moe import MoELayer
from ..ops import Choice, Signature
from ..tasks import Task


def model_signatures(model: nn.Module, dtype: torch.dtype, device: str) -> list[Signature]:
    """Return the signatures of a model's kernels at the resolution for which it was built."""
    return list(
        dict.fromkeys(
            ops.signature(op, device, kind, *(shape if op == "window_attention" else ()))
            for op, kind, *shape in _calls(model, dtype)
            if _has_kernel(device, op, *shape)
        )
    )


def without_kernel(model: nn.Module, dtype: torch.dtype, device: str) -> dict[Signature, Choice]:
    """Return a model's calls for which no kernel is compiled."""
    limits = {
        "window_attention": f"head widths are {', '.join(map(str, ops.KERNEL_HEAD_DIMS))}, windows "
        f"have up to {ops.MAX_KERNEL_TOKENS:,} tokens",
        "moe_route": f"up to {ops.MAX_CUDA_EXPERTS:,} experts",
    }
    return {
        Signature(op, device, ops.signature(op, device, kind).dtype, tuple(shape)): Choice(
            False, f"no kernel: {limits[op]}"
        )
        for op, kind, *shape in _calls(model, dtype)
        if not _has_kernel(device, op, *shape)
    }


def _has_kernel(device: str, op: str, *shape: int) -> bool:
    if op == "moe_route":
        return device != "cuda" or shape[0] <= ops.MAX_CUDA_EXPERTS
    return op != "window_attention" or ops.has_instance(*shape)


def _calls(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield op, dtype and the sizes on which a kernel may depend."""
    for module in model.modules():
        if isinstance(module, WindowAttention):
            window, head_dim = module.window_size, module.proj.in_features // module.num_heads
            yield "window_attention", dtype, window, window, head_dim
        elif isinstance(module, MoELayer) and module.moe.routing != "soft":
            if module.moe.routing == "token_choice":
                yield "moe_route", torch.float32, module.moe.num_experts
            for op in ("moe_dispatch", "moe_combine", "moe_experts"):
                yield op, dtype


def settle(
    task: Task, world: World, dtype: torch.dtype, say: Callable[[str], None]
) -> dict[Signature, Choice]:
    """Try the kernels of a task's model, and use those that run on all ranks.

    Every rank calls this. Kernels that were tried on the machine before are not tried again.

    Args:
        say: prints a line.

    Returns:
        the choices, the same on every rank.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = task.build_model(world.expert, initialise=False)
    lacking = without_kernel(model, dtype, world.device.type)
    wanted = model_signatures(model, dtype, world.device.type)
    if task.config.optimizer.moments == "bf16":
        device = "cpu" if task.config.zero.offload_optimizer != "none" else world.device.type
        wanted.append(ops.signature("adamw_", device, torch.float32))
    mine = ops.decide(wanted, say)
    agreed = {**_agree(gather_objects(mine)), **lacking}
    ops.set_choices(agreed)
    return agreed


ABSENT = Choice(False, "there is no such kernel")


def _agree(ranks: list[dict[Signature, Choice]]) -> dict[Signature, Choice]:
    """Return for each signature the choice of the first rank where its kernel fares worst."""
    agreed = {}
    for key in dict.fromkeys(key for choices in ranks for key in choices):
        found = [choices.get(key, ABSENT) for choices in ranks]
        rank = min(range(len(found)), key=lambda rank: (found[rank].right, found[rank].fused))
        worst = found[rank]
        if not worst.fused and any(choice.fused for choice in found):
            worst = worst._replace(reason=f"on rank {rank}, {worst.reason}")
        agreed[key] = worst
    return agreed
