"""Shifted-window attention from qkv to output, as one op.

Windows are read from the map and written back to it by index arithmetic: nothing is rolled,
partitioned or padded in memory, and no mask is stored. The backward pass recomputes the
probabilities from one number per query. The kernels are in ``csrc/cpu/window_*.h`` and
``csrc/cuda/window_attention*``, the reference in ``window_reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library, choice
from .attention_fallback import attention_fallback
from .dropout import draw_seed
from .leaving import is_leaving
from .window_reference import Windows, backward_reference, forward_reference

KERNEL_HEAD_DIMS = (16, 32, 48, 64)
MAX_KERNEL_TOKENS = 32 * 32  # of a window


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    cosine: bool = True,
    dropout_p: float = 0.0,
    chunk: int = 0,
) -> Tensor:
    """Compute multi-head attention within (shifted) windows of a feature map.

    Sides that the window does not divide are padded internally; padded keys never take part. Under
    autocast, ``qkv`` is cast like the operands of a matrix product. The reference runs for fp64 and
    for head widths other than 16, 32, 48 and 64.

    Args:
        qkv: [B, H, W, 3, heads, head_dim].
        bias: [heads, N, N] position bias of query and key, N tokens in a window; float32 or the
            dtype of ``qkv``.
        scale: [heads, 1, 1]; with ``cosine`` the *log* of the logit scale, clamped at ln 100,
            otherwise the factor itself; float32 or the dtype of ``qkv``.
        window_size: side of a window in tokens, or (height, width).
        shift_size: cyclic shift, or (rows, columns); regions that are not neighbours in the image
            get −100.
        cosine: cosine attention (V2) instead of the scaled dot product (V1).
        dropout_p: dropout on the probabilities, drawn from torch's default generator.
        chunk: number of windows whose matrices the reference holds at once; it recomputes them in
            the backward pass. 0 = all windows, without recomputation. The kernels hold none.

    Returns:
        [B, H, W, heads·head_dim] in the dtype of ``qkv``; differentiable in ``qkv``, ``bias`` and
        ``scale``.

    Raises:
        ValueError: a shape, dtype, device, window or shift does not fit; it names the argument.
    """
    windows = Windows(_pair(window_size), _pair(shift_size), cosine, dropout_p)
    device = qkv.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _attention(qkv, bias, scale, windows, chunk)
    if qkv.is_floating_point() and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _attention(qkv, bias, scale, windows, chunk)


def _attention(qkv: Tensor, bias: Tensor, scale: Tensor, windows: Windows, chunk: int) -> Tensor:
    _check(qkv, bias, scale, windows)
    seed = None
    if windows.dropout_p > 0:
        seed = draw_seed(qkv.device)
    if not fits_kernel(qkv, windows):
        # Chunks save memory in training; they would fix a graph to their number.
        chunk = 0 if is_leaving() else chunk
        return attention_fallback(qkv, bias, scale, seed, windows, chunk)
    out, _ = torch.ops.swin_moe.window_attention(
        qkv, bias.float(), scale.float().flatten(), seed, *_numbers(windows)
    )
    return out


def fits_kernel(qkv: Tensor, windows: Windows) -> bool:
    """Return whether the op supports this call; otherwise the reference runs."""
    height, width = windows.size
    for head_dim in KERNEL_HEAD_DIMS:  # a number, also where a graph leaves the width open
        if head_dim == qkv.shape[5] and has_instance(height, width, head_dim):
            return choice.uses_kernel("window_attention", qkv, height, width, head_dim)
    return False


def has_instance(height: int, width: int, head_dim: int) -> bool:
    """Return whether the kernels serve a window and a head width."""
    return head_dim in KERNEL_HEAD_DIMS and height * width <= MAX_KERNEL_TOKENS


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _numbers(windows: Windows) -> tuple[int, int, int, int, bool, float]:
    return *windows.size, *windows.shift, windows.cosine, windows.dropout_p


def _check(qkv: Tensor, bias: Tensor, scale: Tensor, windows: Windows) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, expected [B, H, W, 3, heads, head_dim]"
        )
    if not qkv.dtype.is_floating_point:
        raise ValueError(f"qkv must be of a float dtype, not {qkv.dtype}")
    if min(windows.size) < 1:
        raise ValueError(f"window_size must be at least 1, not {windows.size}")
    if any(not 0 <= shift < size for shift, size in zip(windows.shift, windows.size, strict=True)):
        raise ValueError(
            f"shift_size must be at least 0 and below window_size {windows.size},"
            f" not {windows.shift}"
        )
    if not 0 <= windows.dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, not {windows.dropout_p}")
    heads, tokens = qkv.shape[4], windows.size[0] * windows.size[1]
    for name, tensor, shape in (
        ("bias", bias, (heads, tokens, tokens)),
        ("scale", scale, (heads, 1, 1)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in (torch.float32, qkv.dtype):
            raise ValueError(
                f"{name} must be float32 or, like qkv, {qkv.dtype}, not {tensor.dtype}"
            )
        if tensor.device != qkv.device:
            raise ValueError(f"{name} is on {tensor.device}, but qkv on {qkv.device}")


def _windows(numbers: tuple[Any, ...]) -> Windows:
    height, width, shift_h, shift_w, cosine, dropout_p = numbers
    return Windows((height, width), (shift_h, shift_w), cosine, dropout_p)


def _forward(
    qkv: Tensor, bias: Tensor, scale: Tensor, seed: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    return forward_reference(qkv, bias, scale.view(-1, 1, 1), seed, _windows(numbers))


def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    windows = _windows(numbers)
    grads = backward_reference(grad_out, qkv, bias, scale.view(-1, 1, 1), seed, out, lse, windows)
    return grads[0], grads[1], grads[2].flatten()


_NUMBERS = "int window_h, int window_w, int shift_h, int shift_w, bool cosine, float dropout_p"
_library.declare(
    "window_attention(Tensor qkv, Tensor bias, Tensor scale, Tensor? seed,"
    f" {_NUMBERS}) -> (Tensor, Tensor)",
    _forward,
)
_library.declare(
    "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias, Tensor scale,"
    f" Tensor? seed, Tensor out, Tensor lse, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    _backward,
)


@torch.library.register_fake("swin_moe::window_attention")
def _(
    qkv: Tensor, bias: Tensor, scale: Tensor, seed: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    B, H, W, _, heads, head_dim = qkv.shape
    rows, cols = _windows(numbers).grid(H, W)
    out = qkv.new_empty(B, H, W, heads * head_dim)
    return out, bias.new_empty(B * rows * cols, heads, bias.shape[1])


@torch.library.register_fake("swin_moe::window_attention_backward")
def _(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.numbers = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias, scale, seed, out, lse = ctx.saved_tensors
    grads = torch.ops.swin_moe.window_attention_backward(
        grad_out, qkv, bias, scale, seed, out, lse, *ctx.numbers
    )
    return *grads, None, *(None for _ in ctx.numbers)


torch.library.register_autograd("swin_moe::window_attention", _gradients, setup_context=_save)
_library.refuse_second_derivative("window_attention")
