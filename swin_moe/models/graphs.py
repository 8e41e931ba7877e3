"""Graphs of blocks by torch.compile, for training; evaluation calls the same methods as they are.

A dense block is one graph. A block with experts is two, before and after its MoE layer, which stays
outside because it exchanges tokens between processes. The blocks of a kind share a graph. Names of
modules and weights do not change. Importing this file does not import the compiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import any_torch_dispatch_mode_on_stack

from ..moe import MoELayer
from .swin import SwinBlock, SwinStage

BACKEND = "inductor"  # of torch.compile
_ROUNDS, _FEW, _ENOUGH = 5, 3, 20.0  # trials of each graph; fewer after these seconds


class Argument(NamedTuple):
    """The form of a tensor that a graph gets."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor) -> Argument:
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad)

    def make(self) -> Tensor:
        """Return random numbers in this form."""
        x = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return x.normal_().requires_grad_(self.requires_grad)


@dataclass
class Graph:
    """A method that the blocks of a kind run as one graph.

    Attributes:
        plain: the method with a code of its own. The compiler keeps graphs by code, and makes those
            sizes dynamic that differ between calls of one code.
        compiled: the same, compiled at its first call.
        example: the forms of the arguments in training; None for an argument that is None.
    """

    plain: Callable[..., Any]
    compiled: Callable[..., Any] | None = None
    blocks: list[SwinBlock] = field(default_factory=list)
    example: list[Argument | None] | None = None

    def trial(self, call: Callable[..., Any]) -> float:
        """Return the seconds of one forward and backward pass of the first block.

        Gradients are returned instead of accumulated, so that no hook of a weight runs.
        """
        assert self.example is not None
        block = self.blocks[0]
        arguments = [form and form.make() for form in self.example]
        weights = [weight for weight in block.parameters() if weight.requires_grad]
        inputs = [x for x in arguments if x is not None and x.requires_grad] + weights
        began = time.perf_counter()
        result = call(block, *arguments)
        results = [
            x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad
        ]
        ones = [torch.ones_like(x) for x in results]
        torch.autograd.grad(results, inputs, ones, allow_unused=True)
        if results[0].is_cuda:
            torch.cuda.synchronize(results[0].device)
        return time.perf_counter() - began


class BlockGraphs:
    """The graphs of a model's blocks; they replace the blocks' methods from the start.

    Blocks that fairscale recomputes (``model.use_checkpoint=offload``) have none: it runs the
    forward pass without gradients, and so with other code than the recompute.

    Args:
        failed: called with the error if a graph cannot be compiled in training. All blocks are
            then as they were before.
    """

    def __init__(
        self,
        model: nn.Module,
        failed: Callable[[Exception], None],
    ) -> None:
        self._failed, self._recording = failed, False
        self._replaced: list[tuple[SwinBlock, str]] = []
        self.graphs: dict[str, Graph] = {}
        for number, stage in enumerate(m for m in model.modules() if isinstance(m, SwinStage)):
            for block in stage.blocks[stage.recomputed if stage.offload else 0 :]:
                self._replace(number, cast("SwinBlock", block))

    def _replace(self, stage: int, block: SwinBlock) -> None:
        shifted = "shifted" if block.shifted else "regular"
        drops = "" if isinstance(block.drop_path, nn.Identity) else "_drop"
        extra = "" if block.norm3 is None else "_norm3"
        for method in ("begin", "end") if isinstance(block.mlp, MoELayer) else ("dense",):
            kind = f"{method}_stage{stage}_{shifted}{drops}{extra}"
            graph = self.graphs.setdefault(kind, Graph(_with_own_code(method, kind)))
            graph.blocks.append(block)
            # Unlike a closure, a copy of the model copies this with its own block.
            setattr(block, method, partial(self._call, graph, block))
            self._replaced.append((block, method))

    def _call(self, graph: Graph, block: SwinBlock, *arguments: Tensor | None) -> Any:
        """Run a method of a block, as a graph where it trains."""
        if self._recording:
            graph.example = [None if x is None else Argument.of(x) for x in arguments]
        trains = block.training and torch.is_grad_enabled()
        # The compiler runs no graph under modes that see each op.
        if graph.compiled is None or not trains or any_torch_dispatch_mode_on_stack():
            return graph.plain(block, *arguments)
        try:
            return graph.compiled(block, *arguments)
        except self._faults as error:  # it compiles before it runs: nothing has happened yet
            self.detach()
            self._failed(error)
            return graph.plain(block, *arguments)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Return a context of a forward pass as in training, whose arguments are then examples."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def compile(self) -> None:
        """Compile all graphs for the recorded arguments, forward and backward.

        Raises:
            Exception: any error of the compiler; the caller then calls :meth:`detach`.
        """
        import torch._functorch.config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self._faults = (TorchDynamoException, FailOnRecompileLimitHit)
        # With the forward pass, where an error can be caught, also for later sizes.
        torch._functorch.config.force_non_lazy_backward_lowering = True
        for graph in self.graphs.values():
            compiled = torch.compile(graph.plain, fullgraph=True, backend=BACKEND)
            if graph.example is not None:
                graph.trial(compiled)
            graph.compiled = compiled

    def speedup(self) -> float:
        """Return the blocks' time without graphs ÷ with graphs, by medians of trials in turns."""
        graphs = [graph for graph in self.graphs.values() if graph.example is not None]
        times: list[tuple[list[float], list[float]]] = [([], []) for _ in graphs]
        began = time.monotonic()
        for turn in range(_ROUNDS):
            if turn >= _FEW and time.monotonic() - began > _ENOUGH:
                break
            for graph, (plain, compiled) in zip(graphs, times, strict=True):
                assert graph.compiled is not None
                plain.append(graph.trial(graph.plain))
                compiled.append(graph.trial(graph.compiled))
        counts = [len(graph.blocks) for graph in graphs]
        totals = [
            sum(count * median(pair[way]) for count, pair in zip(counts, times, strict=True))
            for way in (0, 1)
        ]
        return totals[0] / totals[1]

    def detach(self) -> None:
        """Give the blocks their own methods back."""
        for block, method in self._replaced:
            block.__dict__.pop(method, None)


def _with_own_code(method: str, name: str) -> Callable[..., Any]:
    function = cast("FunctionType", getattr(SwinBlock, method))
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__)
