"""Expert dispatch and combine: token rows to slot rows and back, only by gathers.

A plan of T tokens, k choices each, and S slot rows is two int32 maps, each the other's inverse:

- ``source`` [S]: the assignment ``t * k + j`` that fills a slot, or -1 if it is empty;
- ``destination`` [T, k]: the slot of an assignment, or -1 if it is dropped.

With both maps no pass scatters, so results are deterministic, and every row is copied once, in its
own dtype. Sums over a token's choices are computed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library, choice
from .leaving import is_leaving


def moe_dispatch(x: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    """Copy token rows to their slots: ``out[s] = x[source[s] // k]``, zeros in empty slots.

    Args:
        x: [T, D] tokens.
        source: [S] int32, see above.
        destination: [T, k] int32, see above.

    Returns:
        [S, D] in the dtype of ``x``; differentiable in ``x``.

    Raises:
        ValueError: a shape or an index dtype does not fit.
        RuntimeError, IndexError: an index is out of range (on CUDA: a device-side assertion).
    """
    _check("x", x, destination.shape[:1], source, destination)
    if not choice.uses_kernel("moe_dispatch", x):
        return moe_dispatch_reference(x, source, destination)
    return torch.ops.swin_moe.moe_dispatch(x, source, destination)


def moe_combine(y: Tensor, gate: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    """Combine slot rows: ``out[t] = Σ_j gate[t, j] · y[destination[t, j]]``, summed in fp32.

    A dropped assignment adds nothing, whatever its gate. A token without assignments gives zeros.

    Args:
        y: [S, D] slot rows.
        gate: [T, k] float32, or float64 with a float64 ``y`` (reference only).
        source: [S] int32, see above.
        destination: [T, k] int32, see above.

    Returns:
        [T, D] in the dtype of ``y``; differentiable in ``y`` and ``gate``.

    Raises:
        ValueError: a shape or a dtype does not fit; ``gate`` must be float32 under autocast too.
        RuntimeError, IndexError: an index is out of range (on CUDA: a device-side assertion).
    """
    _check("y", y, source.shape, source, destination)
    double = gate.dtype == y.dtype == torch.float64
    if gate.dtype != torch.float32 and not double:
        raise ValueError(f"gate must be float32, not {gate.dtype}")
    if gate.shape != destination.shape:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}, destination {tuple(destination.shape)}"
        )
    if double or not choice.uses_kernel("moe_combine", y):
        return moe_combine_reference(y, gate, source, destination)
    return torch.ops.swin_moe.moe_combine(y, gate, source, destination)


def moe_dispatch_reference(x: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    """Run `moe_dispatch` in PyTorch for any float dtype, with derivatives of any order."""
    if is_leaving():
        return _gather(x, _tokens(source, destination))
    return _Copy.apply(x, source, destination)


def moe_combine_reference(y: Tensor, gate: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    """Run `moe_combine` in PyTorch for any float dtype, with derivatives of any order."""
    rows = _gather(y, destination) if is_leaving() else _Move.apply(y, destination, source)
    rows = rows.to(torch.promote_types(y.dtype, torch.float32))  # [T, k, D]
    weight = gate.masked_fill(destination < 0, 0).to(rows.dtype)
    return (rows * weight.unsqueeze(-1)).sum(1).to(y.dtype)


# The derivative of a gather by torch is a scatter, which adds in no fixed order on a GPU. With both
# maps it is a gather as well.


class _Copy(torch.autograd.Function):
    """The rows [S, D] of tokens [T, D]; an empty slot is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        ctx.save_for_backward(source, destination)
        return _gather(x, _tokens(source, destination))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gathered.apply(grad, *ctx.saved_tensors), None, None


class _Gathered(torch.autograd.Function):
    """The sums [T, D] of each token's rows [S, D]: the adjoint of :class:`_Copy`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        ctx.save_for_backward(source, destination)
        return _dispatch_backward_reference(rows, destination)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Copy.apply(grad, *ctx.saved_tensors), None, None


class _Move(torch.autograd.Function):
    """Rows [..., D], numbered by the inverse index, at an index; zeros at -1."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _gather(rows.reshape(inverse.numel(), rows.shape[-1]), index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Move.apply(grad, inverse, index), None, None


def _tokens(source: Tensor, destination: Tensor) -> Tensor:
    """Return the token of each slot; -1 stays -1."""
    return torch.div(source, destination.shape[1], rounding_mode="floor")


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows [N, D] at an index of any shape, and zeros at -1."""
    padded = F.pad(rows.contiguous(), (0, 0, 1, 0))  # so the result is contiguous, as declared
    return padded.index_select(0, index.flatten() + 1).view(*index.shape, rows.shape[1])


def _check(name: str, rows: Tensor, size: torch.Size, source: Tensor, destination: Tensor) -> None:
    if source.dtype != torch.int32 or destination.dtype != torch.int32:
        raise ValueError(f"indices must be int32, not {source.dtype} and {destination.dtype}")
    if source.dim() != 1 or destination.dim() != 2 or destination.shape[1] == 0:
        raise ValueError(
            "source must be [S] and destination [T, k ≥ 1],"
            f" not {tuple(source.shape)} and {tuple(destination.shape)}"
        )
    if rows.dim() != 2 or rows.shape[:1] != size:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected [{size[0]}, D]")


def _dispatch_backward_reference(grad_out: Tensor, destination: Tensor) -> Tensor:
    rows = _gather(grad_out, destination)  # [T, k, D]
    return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


def _combine_backward_reference(
    grad_out: Tensor, y: Tensor, gate: Tensor, source: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    token = _tokens(source, destination)
    weight = _gather(gate.reshape(-1, 1), source)  # [S, 1], 0 for an empty slot
    grad_y = (weight * _gather(grad_out, token)).to(y.dtype)
    rows = _gather(y, destination).to(torch.promote_types(y.dtype, torch.float32))
    return grad_y, (rows * grad_out.unsqueeze(1)).sum(-1).to(gate.dtype)


_library.declare(
    "moe_dispatch(Tensor x, Tensor source, Tensor destination) -> Tensor", moe_dispatch_reference
)
_library.declare(
    "moe_dispatch_backward(Tensor grad_out, Tensor destination) -> Tensor",
    _dispatch_backward_reference,
)
_library.declare(
    "moe_combine(Tensor y, Tensor gate, Tensor source, Tensor destination) -> Tensor",
    moe_combine_reference,
)
_library.declare(
    "moe_combine_backward(Tensor grad_out, Tensor y, Tensor gate, Tensor source,"
    " Tensor destination) -> (Tensor, Tensor)",
    _combine_backward_reference,
)


@torch.library.register_fake("swin_moe::moe_dispatch")
def _(x: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    return x.new_empty(source.shape[0], x.shape[1])


@torch.library.register_fake("swin_moe::moe_dispatch_backward")
def _(grad_out: Tensor, destination: Tensor) -> Tensor:
    return grad_out.new_empty(destination.shape[0], grad_out.shape[1])


@torch.library.register_fake("swin_moe::moe_combine")
def _(y: Tensor, gate: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    return y.new_empty(destination.shape[0], y.shape[1])


@torch.library.register_fake("swin_moe::moe_combine_backward")
def _(
    grad_out: Tensor, y: Tensor, gate: Tensor, source: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _save_dispatch(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, _, destination = inputs
    ctx.save_for_backward(destination)


def _dispatch_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    (destination,) = ctx.saved_tensors
    return torch.ops.swin_moe.moe_dispatch_backward(grad_out, destination), None, None


def _save_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_y, grad_gate = torch.ops.swin_moe.moe_combine_backward(grad_out, *ctx.saved_tensors)
    return grad_y, grad_gate, None, None


torch.library.register_autograd(
    "swin_moe::moe_dispatch", _dispatch_backward, setup_context=_save_dispatch
)
torch.library.register_autograd(
    "swin_moe::moe_combine", _combine_backward, setup_context=_save_combine
)
_library.refuse_second_derivative("moe_dispatch")
_library.refuse_second_derivative("moe_combine")
