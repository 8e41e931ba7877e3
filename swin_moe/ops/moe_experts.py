"""The experts' feed-forward on rows that are sorted by expert: Linear, exact GELU, dropout, Linear.

The S rows are sorted by expert. Packed, the rows of expert e start where those of e − 1 end;
padded, they start at e · stride. Expert e has ``used[e]`` rows. Further rows are empty: nothing
reads them, and results there are undefined, NaN included.

The matrix products are torch's own: on a CPU one expert after the other, or all at once if they
have few rows, see docs/experts.md. The steps between them are fused: one pass computes the
activation; one pass of the backward recomputes it together with its gradient, and sums the bias
gradients. Only the rows and the hidden rows before bias and activation are saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _library, choice
from .dropout import draw_seed
from .experts_reference import (
    Weights,
    dropout_of,
    experts_one_by_one,
    moe_experts_reference,
    own_rows,
    split_rows,
)


def moe_experts(
    rows: Tensor,
    used: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    stride: int = 0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Run each expert's feed-forward on its rows: ``dropout(gelu(x W₁ᵀ + b₁)) W₂ᵀ + b₂``.

    All tensors but ``used`` have one dtype, also under autocast. An expert without rows gets
    gradients of exactly zero. With CPU kernels, a row that is not finite affects only its own
    result.

    Args:
        rows: [S, D], sorted by expert.
        used: [E] int64, rows of each expert.
        fc1_weight: [E, H, D].
        fc1_bias: [E, H].
        fc2_weight: [E, D, H].
        fc2_bias: [E, D] or None.
        stride: rows from one expert's first to the next one's, E · stride ≤ S; 0 = packed.
        dropout_p: dropout after the GELU, drawn from torch's default generator.

    Returns:
        [S, D]; undefined in empty rows, and so is the gradient of ``rows``.

    Raises:
        ValueError: a shape, dtype or device does not fit; it names the argument.
        RuntimeError: ``used`` exceeds the number of rows (on CUDA: a device-side assertion).
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check(rows, used, weights, stride, dropout_p)
    seed = draw_seed(rows.device) if dropout_p > 0 else None
    device = rows.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _experts(rows, used, weights, seed, stride, dropout_p)
    return _experts(rows, used, weights, seed, stride, dropout_p)


def _experts(
    rows: Tensor,
    used: Tensor,
    weights: Weights,
    seed: Tensor | None,
    stride: int,
    dropout_p: float,
) -> Tensor:
    if not choice.uses_kernel("moe_experts", rows):
        return moe_experts_reference(
            rows, used, *weights, stride=stride, dropout_p=dropout_p, seed=seed
        )
    keep = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (rows, *weights)
    )
    out, _ = torch.ops.swin_moe.moe_experts(rows, used, *weights, seed, stride, dropout_p, keep, 0)
    return out


def _check(rows: Tensor, used: Tensor, weights: Weights, stride: int, dropout_p: float) -> None:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    if rows.dim() != 2 or not rows.dtype.is_floating_point:
        raise ValueError(f"rows must be [S, D] of a float dtype, not {_describe(rows)}")
    if used.dim() != 1 or used.dtype != torch.int64 or used.shape[0] == 0:
        raise ValueError(f"used must be [E ≥ 1] int64, not {_describe(used)}")
    if fc1_bias.dim() != 2 or fc1_bias.shape[1] == 0:
        raise ValueError(f"fc1_bias must be [E, H ≥ 1], not {_describe(fc1_bias)}")
    E, H, D = used.shape[0], fc1_bias.shape[1], rows.shape[1]
    for name, tensor, shape in (
        ("fc1_weight", fc1_weight, (E, H, D)),
        ("fc1_bias", fc1_bias, (E, H)),
        ("fc2_weight", fc2_weight, (E, D, H)),
        ("fc2_bias", fc2_bias, (E, D)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != rows.dtype):
            raise ValueError(
                f"{name} must be {list(shape)} of {rows.dtype} like rows, not {_describe(tensor)}"
            )
    for name, tensor in (("used", used), ("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        if tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device}, but rows on {rows.device}")
    if stride < 0 or E * stride > rows.shape[0]:
        raise ValueError(
            f"stride is {stride}, which {rows.shape[0]} rows of {E} experts do not fit"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, not {dropout_p}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _forward(
    rows: Tensor,
    used: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    seed: Tensor | None,
    stride: int,
    dropout_p: float,
    keep: bool,
    method: int,
) -> tuple[Tensor, Tensor]:
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    counts = split_rows(rows, used, stride)
    out = experts_one_by_one(rows, counts, weights, dropout_p, seed)
    pre = rows.new_zeros(rows.shape[0] if keep else 0, fc1_bias.shape[1])
    if keep:
        for expert, own in enumerate(own_rows(counts)):
            pre[own] = rows[own] @ fc1_weight[expert].t()
    return out, pre


def _backward(
    grad_out: Tensor,
    rows: Tensor,
    used: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    seed: Tensor | None,
    pre: Tensor,
    stride: int,
    dropout_p: float,
    has_fc2_bias: bool,
    method: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    grad_rows = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    grad_fc1_bias = fc1_bias.new_empty(fc1_bias.shape)
    grad_fc1, grad_fc2 = (
        fc1_weight.new_empty(fc1_weight.shape),
        fc2_weight.new_empty(fc2_weight.shape),
    )
    grad_fc2_bias = rows.new_empty(len(used) if has_fc2_bias else 0, rows.shape[1])
    for expert, own in enumerate(own_rows(split_rows(rows, used, stride))):
        x = pre[own].to(wide) + fc1_bias[expert].to(wide)
        below = (1 + torch.erf(x * math.sqrt(0.5))) / 2
        act, slope = x * below, below + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        if dropout_p > 0:
            kept = dropout_of(seed, own, x, dropout_p)
            act, slope = act * kept, slope * kept
        g = grad_out[own]
        grad_pre = (g @ fc2_weight[expert]).to(wide) * slope
        grad_fc1_bias[expert] = grad_pre.sum(0)
        grad_pre = grad_pre.to(rows.dtype)
        grad_fc2[expert] = g.t() @ act.to(rows.dtype)
        grad_fc1[expert] = grad_pre.t() @ rows[own]
        grad_rows[own] = grad_pre @ fc1_weight[expert]
        if has_fc2_bias:
            grad_fc2_bias[expert] = g.sum(0, dtype=wide)
    return grad_rows, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias


# `keep`: return the hidden rows for a backward pass. `method`: of the matrix products, see
# csrc/bind_moe_experts_products.h; 0 chooses by shape, the others are for benchmarks.
_library.declare(
    "moe_experts(Tensor rows, Tensor used, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,"
    " Tensor? fc2_bias, Tensor? seed, int stride, float dropout_p, bool keep, int method)"
    " -> (Tensor, Tensor)",
    _forward,
)
_library.declare(
    "moe_experts_backward(Tensor grad_out, Tensor rows, Tensor used, Tensor fc1_weight,"
    " Tensor fc1_bias, Tensor fc2_weight, Tensor? seed, Tensor pre, int stride, float dropout_p,"
    " bool has_fc2_bias, int method) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
)


@torch.library.register_fake("swin_moe::moe_experts")
def _(
    rows: Tensor, used: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    keep = others[-2]
    hidden = rows.new_empty(rows.shape[0] if keep else 0, fc1_bias.shape[1])
    return rows.new_empty(rows.shape), hidden


@torch.library.register_fake("swin_moe::moe_experts_backward")
def _(
    grad_out: Tensor,
    rows: Tensor,
    used: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    has_fc2_bias = others[-2]
    return (
        rows.new_empty(rows.shape),
        fc1_weight.new_empty(fc1_weight.shape),
        fc1_bias.new_empty(fc1_bias.shape),
        fc2_weight.new_empty(fc2_weight.shape),
        rows.new_empty(used.shape[0] if has_fc2_bias else 0, rows.shape[1]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, used, fc1_weight, fc1_bias, fc2_weight, fc2_bias, seed, *numbers = inputs
    ctx.save_for_backward(rows, used, fc1_weight, fc1_bias, fc2_weight, seed, output[1])
    ctx.numbers = (*numbers[:2], fc2_bias is not None, numbers[3])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor, _grad_pre: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.swin_moe.moe_experts_backward(grad_out, *ctx.saved_tensors, *ctx.numbers)
    grad_rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias = grads
    has_fc2_bias = ctx.numbers[2]
    return (
        *(grad_rows, None, fc1_weight, fc1_bias, fc2_weight, fc2_bias if has_fc2_bias else None),
        *(None,) * 5,
    )


torch.library.register_autograd("swin_moe::moe_experts", _gradients, setup_context=_save)
_library.refuse_second_derivative("moe_experts")
