"""The experts' feed-forward in PyTorch: the kernels' reference, and the fallback without them.

A GPU must not wait for its host to read how many rows each expert has. So there are three forms:

- padded rows on a GPU are one batch of equal matrices;
- packed rows in bf16 on GPUs of compute capability 9 and 10 use torch's grouped product. Elsewhere
  that product reads its lengths on the host, several times a layer;
- otherwise the lengths are read once, and the experts run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_seed, keep_mask
from .leaving import fixed, is_leaving

Weights = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""fc1_weight, fc1_bias, fc2_weight and fc2_bias, see :func:`swin_moe.ops.moe_experts`."""


def moe_experts_reference(
    rows: Tensor,
    used: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    stride: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Run `moe_experts` in PyTorch for any float dtype, with derivatives of any order.

    Empty rows of the result are zero.

    Args:
        seed: [1] int64, of the dropout; drawn if it is None. The others are those of `moe_experts`.
    """
    if dropout_p > 0 and seed is None:
        seed = draw_seed(rows.device)
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if is_leaving():
        return experts_by_index(rows, used, weights, stride, dropout_p, seed)
    if stride and rows.device.type != "cpu":
        return experts_batched(rows, used, weights, stride, dropout_p, seed)
    if not stride and _grouped_without_wait(rows, *fc1_bias.shape):
        return experts_grouped(rows, used, weights, dropout_p, seed)
    return experts_one_by_one(rows, split_rows(rows, used, stride), weights, dropout_p, seed)


def _grouped_without_wait(rows: Tensor, experts: int, hidden: int) -> bool:
    """Return whether torch's grouped product takes these rows, and leaves the lengths there."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or torch.version.hip:
        return False
    aligned = rows.shape[0] > 0 and rows.shape[1] % 8 == 0 and hidden % 8 == 0  # 16 bytes
    return (
        aligned and experts < 1024 and torch.cuda.get_device_capability(rows.device)[0] in (9, 10)
    )


def experts_one_by_one(
    rows: Tensor, counts: list[int], weights: Weights, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Run one expert after the other.

    Args:
        counts: see :func:`split_rows`.
    """
    # One split and one unbind: their derivative is one copy, that of an index is one an expert.
    parts = list(rows.split(counts))
    fc1_weights, fc1_biases, fc2_weights = (weight.unbind(0) for weight in weights[:3])
    fc2_biases = [None] * len(fc1_weights) if weights[3] is None else weights[3].unbind(0)
    for expert, own in enumerate(own_rows(counts)):
        place = 2 * expert
        if own.start < own.stop or not any(counts[::2]):  # at least one, for the graph of autograd
            hidden = F.gelu(F.linear(parts[place], fc1_weights[expert], fc1_biases[expert]))
            if dropout_p > 0:
                hidden = hidden * dropout_of(seed, own, hidden, dropout_p)
            parts[place] = F.linear(hidden, fc2_weights[expert], fc2_biases[expert])
        parts[place + 1] = rows.new_zeros(parts[place + 1].shape)
    return torch.cat(parts)


def split_rows(rows: Tensor, used: Tensor, stride: int) -> list[int]:
    """Return for each expert its number of rows, then that of the empty rows after them.

    Raises:
        RuntimeError: an expert has more rows than there are.
    """
    counts = used.tolist()
    sizes = []
    start = 0
    for expert, count in enumerate(counts):
        last = expert + 1 == len(counts)
        end = rows.shape[0] if last else start + (stride or count)
        if not 0 <= count <= min(stride or count, end - start):
            raise RuntimeError(f"used[{expert}] is {count}, which exceeds the number of rows")
        sizes += [count, end - start - count]
        start = end
    return sizes


def own_rows(counts: list[int]) -> Iterator[slice]:
    """Yield each expert's rows, from the result of :func:`split_rows`."""
    first = 0
    for own, empty in zip(counts[::2], counts[1::2], strict=True):
        yield slice(first, first + own)
        first += own + empty


def dropout_of(seed: Tensor | None, rows: slice, like: Tensor, dropout_p: float) -> Tensor:
    """Return 0 or 1 / (1 − p) for some of the hidden rows, in the dtype of ``like``."""
    assert seed is not None
    row = torch.arange(rows.start, rows.stop, device=seed.device)
    return keep_mask(seed, row, like.shape[-1], dropout_p).to(like.dtype)


def experts_batched(
    rows: Tensor, used: Tensor, weights: Weights, stride: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Run all experts at once on padded rows, also on empty ones; the host reads nothing."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    E, all_rows = used.shape[0], slice(0, used.shape[0] * stride)
    torch._assert_async(((used >= 0) & (used <= stride)).all())
    filled = torch.arange(stride, device=rows.device) < used[:, None]
    filled = filled[..., None]  # [E, stride, 1]
    # `where` also stops the gradients of empty rows, which may be NaN.
    x = rows[all_rows].view(E, stride, -1).where(filled, 0)
    hidden = F.gelu(torch.baddbmm(fc1_bias[:, None], x, fc1_weight.transpose(1, 2)))
    if dropout_p > 0:
        hidden = hidden * dropout_of(seed, all_rows, hidden, dropout_p).view_as(hidden)
    if fc2_bias is None:
        out = hidden @ fc2_weight.transpose(1, 2)
    else:
        out = torch.baddbmm(fc2_bias[:, None], hidden, fc2_weight.transpose(1, 2))
    out = out.where(filled, 0).flatten(0, 1)
    return F.pad(out, (0, 0, 0, rows.shape[0] - all_rows.stop))


def experts_grouped(
    rows: Tensor, used: Tensor, weights: Weights, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Run all experts at once on packed rows by torch's grouped product."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    ends = used.cumsum(0)
    torch._assert_async((used >= 0).all() & (ends[-1] <= rows.shape[0]))
    number = torch.arange(rows.shape[0], device=rows.device)
    filled = (number < ends[-1])[:, None]
    own = (number[:, None] >= ends - used) & (number[:, None] < ends)
    choice = own.to(rows.dtype)  # [S, E]
    ends = ends.to(torch.int32)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch._grouped_mm(x, _GradientOfUsed.apply(weight, used).transpose(1, 2), offs=ends)
        # Its empty rows are as they were in memory, and so are those of its gradients.
        return (y if bias is None else y + choice @ bias).where(filled, 0)

    hidden = F.gelu(product(rows.contiguous().where(filled, 0), fc1_weight, fc1_bias))
    if dropout_p > 0:
        hidden = hidden * dropout_of(seed, slice(0, rows.shape[0]), hidden, dropout_p)
    return product(hidden, fc2_weight, fc2_bias)


class _GradientOfUsed(torch.autograd.Function):
    """The weights; the gradient is zero for experts without rows, where it may be undefined."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(used)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (used,) = ctx.saved_tensors
        return grad.masked_fill((used == 0)[:, None, None], 0), None


def experts_by_index(
    rows: Tensor, used: Tensor, weights: Weights, stride: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Run one expert after the other in a graph, where their numbers of rows are unknown."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    start = used.cumsum(0) - used
    if stride:
        start = torch.arange(used.shape[0], device=used.device) * stride
    number = torch.arange(rows.shape[0], device=rows.device)
    out = torch.zeros_like(rows)
    for expert in range(fixed(used.shape[0])):
        past = number - start[expert]
        own = ((past >= 0) & (past < used[expert])).nonzero().squeeze(1)
        hidden = F.gelu(F.linear(rows.index_select(0, own), fc1_weight[expert], fc1_bias[expert]))
        if dropout_p > 0:
            assert seed is not None
            hidden = hidden * keep_mask(seed, own, hidden.shape[1], dropout_p).to(hidden.dtype)
        bias = None if fc2_bias is None else fc2_bias[expert]
        out = out.index_put((own,), F.linear(hidden, fc2_weight[expert], bias))
    return out
