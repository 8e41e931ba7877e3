"""What activation checkpointing must not do twice: a recompute never re-routes a token.

PyTorch's selective checkpointing keeps a list of ops, too, but numbers every other op as well, and
fails where the recompute runs more of them than the forward pass, as ZeRO-3 does when it gathers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..ops import ROUTING_OPS


class _Record(TorchDispatchMode):
    """Runs everything and keeps what the routing ops return."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ROUTING_OPS:
            self.kept.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Replay(TorchDispatchMode):
    """Runs everything but the routing ops, which return what they returned before."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept, self.next = kept, 0

    def __enter__(self) -> Any:
        self.next = 0  # a graph that is kept may be run backward again
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ROUTING_OPS:
            return func(*args, **(kwargs or {}))
        self.next += 1
        return tree_map_only(Tensor, Tensor.detach, self.kept[self.next - 1])


def keep_routing() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of the forward pass and of the recompute, for ``torch.utils.checkpoint``."""
    kept: list[Any] = []
    return _Record(kept), _Replay(kept)
