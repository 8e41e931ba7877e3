"""Routing, from logits to row maps: score, top-k, order, slots, counts and loss sums in one op.

Tokens choose experts (https://arxiv.org/abs/2006.16668). Every expert has a queue of its tokens:
first choices before second ones, within a choice by descending score (batch-prioritised routing,
https://arxiv.org/abs/2106.05974, section 4) or by index, ties by index. Assignments beyond the
capacity are dropped. Tokens may be split into groups (one per image) with separate queues.

Rows are the experts' input, sorted by expert, then by group, then by place in the queue. They
follow each other without gaps (packed), or every expert has an equal block with an empty end
(padded).

A token with a logit that is not finite is dropped, takes part in no sum and gets no gradient. It is
counted (``scalars``), so that a bad token neither spreads nor stays hidden.

The kernels are in ``csrc/cpu/moe_route*`` and ``csrc/cuda/moe_route*``; they save no probabilities
for the gradient but recompute them. The reference is in ``route_reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library, choice
from .route_reference import (
    Route,
    RouteOptions,
    assign_reference,
    backward_reference,
    moe_route_reference,
)

MAX_CUDA_EXPERTS = 1024  # kMaxExperts in csrc/cuda/moe_route_token.cuh


def moe_route(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, options: RouteOptions
) -> Route:
    """Route T tokens to k of E experts each.

    Probabilities are the scores (softmax), or the scores over their sum (sigmoid). An expert's load
    is the chance that its clean probability exceeds the token's k-th noisy *logit* under the noise:
    Φ((p − l_k) / σ) summed over tokens. Tutel compares a probability with a logit, and so the
    published models were trained.

    Args:
        logits: [T, E] float32.
        noise: [T, E], added to the logits, or None.
        bias: [E], added to the scores only for the choice of experts, not in the gate, or None
            (https://arxiv.org/abs/2408.15664).
        options: see :class:`RouteOptions`.

    Raises:
        ValueError: a shape, a dtype or an option does not fit.
    """
    _check(logits, noise, bias, options)
    if not fits_kernel(logits, noise, bias):
        return moe_route_reference(logits, noise, bias, options)
    results = torch.ops.swin_moe.moe_route(logits, noise, bias, *options)
    return Route(**dict(zip(_RESULTS, results, strict=True)))


def fits_kernel(logits: Tensor, noise: Tensor | None, bias: Tensor | None) -> bool:
    """Return whether the op supports this call; otherwise the reference runs."""
    # Kernels are fp32 only: the order of scores and the sums over all tokens need it.
    given = [tensor for tensor in (logits, noise, bias) if tensor is not None]
    return (
        all(tensor.dtype == torch.float32 for tensor in given)
        and (logits.device.type != "cuda" or logits.shape[1] <= MAX_CUDA_EXPERTS)
        and choice.uses_kernel("moe_route", logits)
    )


def _check(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, options: RouteOptions
) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, E], not {tuple(logits.shape)}")
    T, E = logits.shape
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, logits {tuple(logits.shape)}")
    if bias is not None and bias.shape != (E,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected [{E}]")
    if not 1 <= options.top_k <= E:
        raise ValueError(f"top_k={options.top_k} must be between 1 and the {E} experts")
    if options.capacity < 0:
        raise ValueError(f"capacity={options.capacity} must not be negative")
    if options.groups < 1 or T % options.groups:
        raise ValueError(f"{T} tokens cannot be cut into {options.groups} equal groups")
    if options.padded and not options.capacity:
        raise ValueError("padded rows need a capacity")


# The op's results: first the three with a gradient, then integers.
_RESULTS = (
    "gate", "sums", "scalars", "expert", "slot", "source", "destination", "counts", "first", "used",
)  # fmt: skip
_OPTIONS = (
    "int top_k, bool sigmoid, bool normalize, bool prioritized, int groups, int capacity,"
    " bool padded, float load_sigma"
)


def _forward(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    route = moe_route_reference(logits, noise, bias, RouteOptions(*options))
    return tuple(getattr(route, name) for name in _RESULTS)


def _backward(
    grad_gate: Tensor | None,
    grad_sums: Tensor | None,
    grad_scalars: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    expert: Tensor,
    *options: Any,
) -> Tensor:
    grads = (grad_gate, grad_sums, grad_scalars)
    return backward_reference(*grads, logits, noise, expert, RouteOptions(*options))


_library.declare(
    f"moe_route(Tensor logits, Tensor? noise, Tensor? bias, {_OPTIONS})"
    f" -> ({', '.join('Tensor' for _ in _RESULTS)})",
    _forward,
)
_library.declare(
    "moe_route_backward(Tensor? grad_gate, Tensor? grad_sums, Tensor? grad_scalars, Tensor logits,"
    f" Tensor? noise, Tensor expert, {_OPTIONS}) -> Tensor",
    _backward,
)
_library.declare(
    f"moe_assign(Tensor chosen_by, Tensor priority, Tensor finite, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    assign_reference,
    internal=True,
)


def _fake_plan(logits: Tensor, options: RouteOptions) -> tuple[Tensor, ...]:
    """Return empty expert, slot, source, destination, counts, first and used."""
    T, E = logits.shape

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    small, wide = torch.int32, torch.int64
    return (
        empty(wide, T, options.top_k),
        empty(small, T, options.top_k),
        empty(small, options.rows(T, E)),
        empty(small, T, options.top_k),
        *(empty(wide, E) for _ in range(3)),
    )


@torch.library.register_fake("swin_moe::moe_assign")
def _(chosen_by: Tensor, priority: Tensor, finite: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return _fake_plan(chosen_by, RouteOptions(*options))


@torch.library.register_fake("swin_moe::moe_route")
def _(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    plan = _fake_plan(logits, RouteOptions(*options))
    gate, sums = logits.new_empty(plan[0].shape), logits.new_empty(3, logits.shape[1])
    return gate, sums, logits.new_empty(5), *plan


@torch.library.register_fake("swin_moe::moe_route_backward")
def _(
    grad_gate: Tensor | None,
    grad_sums: Tensor | None,
    grad_scalars: Tensor | None,
    logits: Tensor,
    *others: Any,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, noise, _, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # often some are not needed
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(logits, noise, output[_RESULTS.index("expert")])


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = None
    if any(part is not None for part in grads[:3]):
        grad = torch.ops.swin_moe.moe_route_backward(*grads[:3], *ctx.saved_tensors, *ctx.options)
    return grad, None, None, *(None for _ in ctx.options)


torch.library.register_autograd("swin_moe::moe_route", _gradient, setup_context=_save)
_library.refuse_second_derivative("moe_route")
