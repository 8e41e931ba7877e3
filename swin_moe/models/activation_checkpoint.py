"""Activation checkpointing: the backward pass computes blocks again, with the same routing.

PyTorch's selective checkpointing could keep the routing ops, but it numbers every other op as well.
It fails if the recompute runs more ops than the forward pass, as under ZeRO-3, which gathers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper, is_recomputing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..moe import MoELayer, RoutingStats
from ..ops import ROUTING_OPS


class _Mode(TorchDispatchMode):
    """A mode under which graphs of torch.compile run: it changes the routing ops alone."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Record(_Mode):
    """A mode that runs every op and keeps the results of the routing ops."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ROUTING_OPS:
            self.kept.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Replay(_Mode):
    """A mode that runs every op except the routing ops, whose kept results it returns."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept, self.next = kept, 0

    def __enter__(self) -> Any:
        self.next = 0  # with retain_graph, backward may run again
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ROUTING_OPS:
            return func(*args, **(kwargs or {}))
        self.next += 1
        return tree_map_only(Tensor, Tensor.detach, self.kept[self.next - 1])


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def keep_routing() -> Contexts:
    """Return contexts of forward pass and recompute, for ``torch.utils.checkpoint``."""
    kept: list[Any] = []
    return _Record(kept), _Replay(kept)


def _contexts(block: nn.Module) -> Contexts:
    """Return a block's contexts: the modes slow down every op, and a dense block routes nothing."""
    if any(isinstance(module, MoELayer) for module in block.modules()):
        return keep_routing()
    return nullcontext(), nullcontext()


class _Call(nn.Module):
    """One call of a block under fairscale's ``checkpoint_wrapper``.

    The wrapper runs the forward pass without gradients. It supports only tensors as results, and
    autocast only in fp16 on CUDA; this class adds the rest.
    """

    def __init__(self, block: nn.Module, device: str) -> None:
        super().__init__()
        self.block = block
        self.record, self.replay = _contexts(block)
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = partial(torch.autocast, device, dtype=dtype, enabled=enabled)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        with self.replay if is_recomputing() else self.record, self.autocast():
            # Statistics have no gradient: they stay one object.
            leaves, self.structure = tree_flatten(
                self.block(x), is_leaf=lambda value: isinstance(value, RoutingStats)
            )
        return tuple(leaves)


def recomputed(block: nn.Module, x: Tensor, *, offload: bool) -> Any:
    """Return ``block(x)``, keeping only x for the backward pass, which computes the block again.

    Args:
        offload: keep x in host memory.
    """
    if not offload:
        return checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
    # On CUDA the copies are asynchronous: fairscale asks PyTorch for that, which then pins memory.
    call = checkpoint_wrapper(_Call(block, x.device.type), offload_to_cpu=True)
    return tree_unflatten(call(x), call.structure)
