"""Replaces the parts of an MoE layer that need other ranks or data, for a trace with neither.

Loads are even: each expert gets an equal share of the rows, and each rank receives as many as it
sends.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moe import MoELayer
from ..moe.plan import DispatchPlan, Kernels
from ..ops import moe_experts


def stand_in(layer: MoELayer, padded: bool, fused: bool) -> None:
    """Change a layer of a fake model so that it runs without other ranks and data.

    Args:
        layer: to change.
        padded: experts get their full capacity.
        fused: the compiled ops run.
    """
    kernels = layer.kernels
    experts = moe_experts if fused else _experts
    layer.kernels = Kernels(kernels.route, kernels.dispatch, kernels.combine, experts)
    layer.experts.kernels = layer.kernels
    layer.padded = padded
    if layer.group.size > 1:
        layer._apply_experts = MethodType(_apply_experts, layer)  # type: ignore[method-assign]


def _experts(
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
    """Compute all experts at once, with as much memory and FLOPs as the reference's loop."""
    each, rest = divmod(rows.shape[0], used.shape[0])
    own = rows[: rows.shape[0] - rest].view(used.shape[0], each, -1)
    hidden = F.gelu(torch.baddbmm(fc1_bias[:, None], own, fc1_weight.transpose(1, 2)))
    if dropout_p > 0:
        hidden = hidden * torch.empty_like(hidden)
    out = torch.bmm(hidden, fc2_weight.transpose(1, 2))
    if fc2_bias is not None:
        out = out + fc2_bias[:, None]
    return torch.cat((out.flatten(0, 1), rows.new_zeros(rest, rows.shape[1])))


class _Travel(torch.autograd.Function):
    """An exchange of rows for as many others in a new buffer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _buffer(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _buffer(grads[0])


def _buffer(rows: Tensor) -> Tensor:
    return rows.new_empty_strided(rows.shape, (rows.shape[1], 1))


def _apply_experts(layer: MoELayer, rows: Tensor, plan: DispatchPlan) -> tuple[Tensor, float]:
    """Apply the experts as :class:`~swin_moe.moe.dispatcher.TokenDispatcher` with one chunk."""
    weights = layer.experts.weights_as(rows.dtype)
    local = len(layer.experts.share.experts)
    used = plan.used.new_empty(local)
    chunk = _Travel.apply(rows)
    if local > 1:  # sort the rows from by rank to by expert, and back
        order = plan.used.new_empty(rows.shape[0])
        source = order.to(torch.int32)
        destination = order.new_empty(order.shape).to(torch.int32).view(-1, 1)
        chunk = layer.kernels.dispatch(chunk, source, destination)
        chunk = layer.experts(chunk, used, weights=weights)
        chunk = layer.kernels.dispatch(chunk, destination[:, 0], source[:, None])
    else:
        chunk = layer.experts(chunk, used, weights=weights)
    return _Travel.apply(chunk), 0.0
