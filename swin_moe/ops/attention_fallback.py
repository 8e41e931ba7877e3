"""Window attention without a kernel: the reference, compiled on a GPU.

Each op of the reference reads and writes matrices of logits. A compiler fuses all steps between the
products, and recomputes most of them in the backward pass; ``benchmarks/fallback.py`` counts both.
One graph serves all sizes of a map, all batches and all numbers of heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.text import reason
from . import choice
from .leaving import is_leaving
from .window_reference import Windows, attend_reference, attention_reference

logger = logging.getLogger("swin_moe")

GRAPHS = 128  # at most in one process; torch's own limit of eight is for one function
_compiler_failed = False
_ready: set[tuple[Any, ...]] = set()  # kinds of calls whose graphs have run


class Call(NamedTuple):
    """The arguments of a compiled call; tensors as in ``attend_reference``.

    Attributes:
        first: [] int64 number of the first window, None without dropout.
    """

    x: Tensor
    bias: Tensor
    scale: Tensor
    seed: Tensor | None
    mask: Tensor | None
    first: Tensor | None
    cosine: bool
    dropout_p: float


def attention_fallback(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    windows: Windows,
    chunk: int = 0,
) -> Tensor:
    """Run `attention_reference`, compiled if that is possible; then without a second derivative."""
    attend = _attend if _may_compile(qkv, bias) else None
    return attention_reference(qkv, bias, scale, seed, windows, chunk, attend)


def compiles_on(device: torch.device) -> bool:
    """Return whether to compile on a device; on a CPU that takes longer than it can save."""
    return device.type == "cuda"


def _may_compile(qkv: Tensor, bias: Tensor) -> bool:
    return (
        compiles_on(qkv.device)
        and not _compiler_failed
        and choice.kernels_wanted()  # `use_references` also rules out errors of a compiler
        and torch.float64 not in (qkv.dtype, bias.dtype)
        and qkv.numel() > 0
        and type(qkv) is Tensor  # not a fake one
        and not (torch.compiler.is_compiling() or is_leaving())
        and torch._C._functorch.peek_interpreter_stack() is None
        and _modes_allow_it()
    )


def _modes_allow_it() -> bool:
    """Return whether no mode wants to see each op; activation checkpointing does not."""
    modes = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return all(getattr(mode, "ignore_compile_internals", bool)() for mode in modes)


def _attend(
    x: Tensor,
    bias: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    windows: Windows,
    mask: Tensor | None,
    first: int = 0,
) -> Tensor:
    """Run `attend_reference` as a graph, or as it is once the compiler has failed."""
    number = None if seed is None else torch.full((), first, device=x.device)
    call = Call(x.contiguous(), bias, scale, seed, mask, number, windows.cosine, windows.dropout_p)
    if not _compiler_failed and _is_ready(call):
        try:
            return _run_graph(call)
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:
            _give_up(error)  # an error of the device, or of whoever recomputes this, passes
    return attend_reference(x, bias, scale, seed, windows, mask, first)


def _is_ready(call: Call) -> bool:
    """Return whether the graph of a kind of call works; compile it at the first one."""
    kind = _kind(call)
    if kind not in _ready:
        try:
            _try(call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail in any way
            _give_up(error)
            return False
        _ready.add(kind)
    return True


def _give_up(error: Exception) -> None:
    """Compile nothing from now on, and log why."""
    global _compiler_failed
    _compiler_failed = True
    cause = getattr(error, "inner_exception", error)
    logger.warning(
        "window attention is not compiled, the slower reference runs: %s: %s",
        type(cause).__name__, reason(cause),
    )  # fmt: skip


def _kind(call: Call) -> tuple[Any, ...]:
    """Return what a graph is compiled for; the compiler treats a size of one apart."""
    B, nW, N, _, heads, head_dim = call.x.shape
    tensors = (call.x, call.bias, call.scale)
    return (
        call.x.device,
        N,
        head_dim,
        (B == 1, nW == 1, heads == 1),
        call.mask is None,
        call.cosine,
        call.dropout_p,
        tuple((tensor.dtype, tensor.requires_grad) for tensor in tensors),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@cache
def _graph() -> Callable[..., Tensor]:
    options: dict[str, Any] = {}
    import torch._inductor.config as config  # imports sympy and more: seconds

    if hasattr(config, "deterministic"):
        options["deterministic"] = True  # no choice by measured times, which would change rounding
    return torch.compile(_run, fullgraph=True, options=options)


def _run(*call: Any) -> Tensor:
    x, bias, scale, seed, mask, first, cosine, dropout_p = call
    windows = Windows((0, 0), (0, 0), cosine, dropout_p)  # x is already split
    return attend_reference(x, bias, scale, seed, windows, mask, first, scale_q=True)


def _try(call: Call) -> None:
    """Compile the graph of a kind of call, and run it on a few windows, the backward pass too.

    So a fault of the compiler shows here, where the reference can still run instead.
    """
    import torch._dynamo
    import torch._functorch.config

    B, nW, N, _, heads, head_dim = call.x.shape
    # The compiler treats sizes that are equal here as always equal.
    B, nW, heads = min(B, 3), (11 if N <= 256 else 5) if nW > 1 else 1, 7 if heads > 1 else 1
    x = call.x.new_zeros(B, nW, N, 3, heads, head_dim)
    bias, scale = call.bias.new_zeros(heads, N, N), call.scale.new_zeros(heads, 1, 1)
    mask = None if call.mask is None else call.mask.new_zeros(nW, N, N)
    inputs = [x, bias, scale]
    for small, own in zip(inputs, call[:3], strict=True):
        small.requires_grad_(own.requires_grad)
    for tensor, sizes in ((x, (0, 1, 4)), (bias, 0), (scale, 0), (mask, 0)):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, sizes)
    # Activation checkpointing must not count these tensors.
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        out = _run_graph(call._replace(x=x, bias=bias, scale=scale, mask=mask))
        if out.requires_grad:
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            torch.autograd.grad(out, wanted, torch.zeros_like(out))


def _run_graph(call: Call) -> Tensor:
    """Run a call; the backward pass is compiled with it, so that no fault shows only there."""
    with (
        torch._dynamo.config.patch(recompile_limit=GRAPHS),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        return _graph()(*call)


def _same(tensor: Tensor) -> Tensor:
    return tensor
