"""Shifted-window attention in PyTorch: the reference of the kernels, and the fallback without them.

Formulas: Swin Transformer V2 (https://arxiv.org/abs/2111.09883), section 3.2. The backward pass is
FlashAttention-2's (https://arxiv.org/abs/2307.08691), appendix B, extended by the norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dropout import keep_mask
from .leaving import is_leaving, sides

MASK_VALUE = -100.0  # additive as in the official code; V2's logits may exceed 100, then keys leak
MAX_LOG_SCALE = math.log(100.0)
MIN_NORM = 1e-12  # torch.nn.functional.normalize's default


class Windows(NamedTuple):
    """The windows of a map, the same for every tensor of one call.

    Attributes:
        size: (height, width) of a window in tokens.
        shift: (rows, columns) of the cyclic shift.
        cosine: cosine attention, otherwise the scaled dot product.
        dropout_p: dropout on the probabilities.
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    cosine: bool = True
    dropout_p: float = 0.0

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the (rows, columns) of windows on a map, padding included."""
        return -(-height // self.size[0]), -(-width // self.size[1])

    def split(self, x: Tensor) -> Tensor:
        """Split a map [B, H, W, ...] into windows [B, nW, N, ...], with zero padding."""
        H, W = sides(x)
        rows, cols = self.grid(H, W)
        if self.padded(H, W):
            below, right = rows * self.size[0] - H, cols * self.size[1] - W
            x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, right, 0, below))
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        x = x.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def merge(self, x: Tensor, height: int, width: int) -> Tensor:
        """Merge windows [B, nW, N, ...] to the map [B, H, W, ...] without its padding."""
        rows, cols = self.grid(height, width)
        x = x.unflatten(2, self.size).unflatten(1, (rows, cols)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        if any(self.shift):
            x = torch.roll(x, self.shift, (1, 2))
        if not self.padded(height, width):
            return x
        # Later ops copy the slice anyway; a copy here spares graphs a test of contiguity.
        return x[:, :height, :width].clone(memory_format=torch.contiguous_format)

    def padded(self, height: int, width: int) -> bool:
        """Return whether there may be padding, which is unknown for a graph's dynamic size."""
        over = height % self.size[0], width % self.size[1]
        if type(height) is type(width) is int and not torch.compiler.is_compiling():
            return any(over)
        # Only for graphs, since it imports sympy.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return not all(statically_known_true(rest == 0) for rest in over)

    def mask(self, height: int, width: int, like: Tensor) -> Tensor | None:
        """Return [nW, N, N]: 0 within a region, −100 across regions, −inf for padded keys."""
        if not (any(self.shift) or self.padded(height, width)):
            return None
        # Graphs compute their mask, since they may accept other sizes. Masks of fake tensors must
        # not be cached for real ones.
        kept = type(like) is Tensor and not (torch.compiler.is_compiling() or is_leaving())
        build = _cached_region_mask if kept else _region_mask
        return build(height, width, self.size, self.shift, like.device)


def attention_reference(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    windows: Windows,
    chunk: int = 0,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Run `window_attention` in PyTorch for any float dtype, with derivatives of any order.

    Args:
        chunk: windows computed at once, and recomputed in the backward pass; 0 = all, without
            recomputation. See Swin Transformer V2 (https://arxiv.org/abs/2111.09883), section 3.4.
        attend: runs instead of :func:`attend_reference`, with its arguments.
    """
    attend = attend or attend_reference
    H, W = sides(qkv)
    x = windows.split(qkv)  # [B, nW, N, 3, heads, d]
    mask = windows.mask(H, W, qkv)
    if not chunk:
        return windows.merge(attend(x, bias, scale, seed, windows, mask), H, W)
    B = qkv.shape[0]
    number = torch.arange(B * x.shape[1], device=qkv.device)
    parts = [
        checkpoint(
            attend, part, bias, scale, seed, windows,
            None if mask is None else mask[numbers % x.shape[1]], index * chunk,
            use_reentrant=False, preserve_rng_state=False,
        )
        for index, (part, numbers) in enumerate(
            zip(x.flatten(0, 1)[None].split(chunk, 1), number.split(chunk), strict=True)
        )
    ]  # fmt: skip
    return windows.merge(torch.cat(parts, 1).unflatten(1, (B, -1))[0], H, W)


def attend_reference(
    x: Tensor,
    bias: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    windows: Windows,
    mask: Tensor | None,
    first: int | Tensor = 0,
    *,
    scale_q: bool = False,
) -> Tensor:
    """Compute windows [B, nW, N, 3, heads, d], numbered from ``first``, to [B, nW, N, C].

    Args:
        scale_q: see :func:`_logits`.
    """
    q, k, v = x.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [B, nW, heads, N, d]
    probabilities = _logits(q, k, bias, scale, windows, mask, scale_q).softmax(-1)
    if windows.dropout_p > 0:
        probabilities = probabilities * _keep(seed, probabilities, windows.dropout_p, first)
    return (probabilities.to(v.dtype) @ v).transpose(2, 3).flatten(3)


def forward_reference(
    qkv: Tensor, bias: Tensor, scale: Tensor, seed: Tensor | None, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Return the op's output, and log₂ Σ 2^(logit·log₂e) per query [B·nW, heads, N]."""
    H, W = qkv.shape[1:3]
    q, k, _ = windows.split(qkv).permute(3, 0, 1, 4, 2, 5).unbind(0)
    lse = _logits(q, k, bias, scale, windows, windows.mask(H, W, q)).logsumexp(-1) * math.log2(
        math.e
    )
    return attention_reference(qkv, bias, scale, seed, windows), lse.flatten(0, 1).to(bias.dtype)


def backward_reference(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    windows: Windows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of qkv, bias and scale by the kernels' formulas, in fp32 at least."""
    H, W, heads = qkv.shape[1], qkv.shape[2], qkv.shape[4]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    raw_q, raw_k, v = windows.split(qkv.to(wide)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    per_head = (windows.split(x.to(wide)).unflatten(3, (heads, -1)) for x in (grad_out, out))
    grad, out = (x.transpose(2, 3) for x in per_head)  # [B, nW, heads, N, d]
    q, k = (_unit(raw_q), _unit(raw_k)) if windows.cosine else (raw_q, raw_k)
    logits = _logits(raw_q, raw_k, bias, scale, windows, windows.mask(H, W, q))
    p = torch.exp2(logits * math.log2(math.e) - lse.view(logits.shape[:-1]).unsqueeze(-1))
    keep = _keep(seed, p, windows.dropout_p) if windows.dropout_p > 0 else torch.ones_like(p)
    grad_v = (p * keep).transpose(-2, -1) @ grad
    grad_p = keep * (grad @ v.transpose(-2, -1))
    grad_logits = p * (grad_p - (grad * out).sum(-1, keepdim=True))
    factor = _factor(scale, windows.cosine, wide)
    grad_q, grad_k = grad_logits @ k * factor, grad_logits.transpose(-2, -1) @ q * factor
    grad_factor = (grad_logits @ k * q).sum((0, 1, 3, 4)).view_as(scale)
    if windows.cosine:
        grad_factor = grad_factor * factor * (scale <= MAX_LOG_SCALE)
        grad_q, grad_k = _through_unit(raw_q, q, grad_q), _through_unit(raw_k, k, grad_k)
    grads = torch.stack([grad_q, grad_k, grad_v], 3)  # [B, nW, heads, 3, N, d]
    grad_qkv = windows.merge(grads.permute(0, 1, 4, 3, 2, 5), H, W)
    return (
        grad_qkv.to(qkv.dtype),
        grad_logits.sum((0, 1)).to(bias.dtype),
        grad_factor.to(bias.dtype),
    )


def _factor(scale: Tensor, cosine: bool, dtype: torch.dtype) -> Tensor:
    factor = scale.to(dtype)
    return factor.clamp(max=MAX_LOG_SCALE).exp() if cosine else factor


def _logits(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    scale: Tensor,
    windows: Windows,
    mask: Tensor | None,
    scale_q: bool = False,
) -> Tensor:
    """Return logits [B, nW, heads, N, N] in at least fp32.

    Args:
        scale_q: apply the factor to q instead of to the products, which are many more numbers: a
            graph then moves fewer bytes. Both are as accurate, but round differently.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = _factor(scale, windows.cosine, wide)
    added = bias.to(wide) if mask is None else bias.to(wide) + mask.to(wide)[:, None]
    if scale_q:
        scaled = (_unit(q.to(wide)) if windows.cosine else q.to(wide)) * factor
        k = _unit(k) if windows.cosine else k
        return scaled.to(q.dtype) @ k.transpose(-2, -1) + added
    if windows.cosine:
        q, k = _unit(q), _unit(k)
    return (q @ k.transpose(-2, -1)).to(wide) * factor + added


def _unit(x: Tensor) -> Tensor:
    """Return rows of length one; the norm is computed in at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1, eps=MIN_NORM).to(x.dtype)


def _through_unit(raw: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of rows from that of their unit rows; a clamped norm is constant."""
    norm = raw.norm(dim=-1, keepdim=True)
    radial = (unit * grad).sum(-1, keepdim=True).where(norm > MIN_NORM, 0.0)
    return (grad - unit * radial) / norm.clamp(min=MIN_NORM)


def _keep(
    seed: Tensor | None, probabilities: Tensor, dropout_p: float, first: int | Tensor = 0
) -> Tensor:
    """Return 0 or 1 / (1 − p) per probability [B, nW, heads, N, N], by the query's number.

    Args:
        first: number of the first window.
    """
    assert seed is not None
    B, nW, heads, N, _ = probabilities.shape
    row = torch.arange(B * nW * heads * N, device=seed.device) + first * heads * N
    return keep_mask(seed, row, N, dropout_p).view_as(probabilities)


def _region_ids(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Return the region of each position of the shifted axis, [⌈length / window⌉, window].

    Regions are 0 to 2 as in the paper, and −1 for padding.
    """
    windows = -(-length // window)
    padded = windows * window
    shifted = torch.arange(padded, device=device)
    ids = torch.zeros_like(shifted)
    if shift:
        ids = (shifted >= padded - window).long() + (shifted >= padded - shift).long()
    original = (shifted + shift) % padded
    return torch.where(original < length, ids, -1).view(windows, window)


def _region_mask(
    H: int, W: int, size: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    row = _region_ids(H, size[0], shift[0], device)[:, None, :, None]
    col = _region_ids(W, size[1], shift[1], device)[None, :, None, :]
    region = torch.where((row < 0) | (col < 0), -1, row * 3 + col)  # [rows, cols, h, w]
    region = region.flatten(2).flatten(0, 1)
    different = region[:, None, :] != region[:, :, None]
    mask = torch.where(different, MASK_VALUE, 0.0)
    return mask.masked_fill((region < 0)[:, None, :], float("-inf"))


@lru_cache(maxsize=64)
def _cached_region_mask(
    H: int, W: int, size: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _region_mask(H, W, size, shift, device)
