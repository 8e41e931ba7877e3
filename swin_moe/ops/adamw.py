"""AdamW (https://arxiv.org/abs/1711.05101) in place, with bf16 moments, in one pass over memory.

With the factors of update t, step by step in fp32, for an element with gradient g:

    m ← m + (g − m) · (1 − β₁)
    v ← v · β₂ + (g · (1 − β₂)) · g
    w ← w · (1 − lr · decay) − (m · rate) / (√v + ε')

    rate = lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ),  ε' = ε · √(1 − β₂ᵗ)

Every operation is rounded by itself, none is fused, so all kernels and the reference agree bit for
bit; only the CPU's kernels take denormal numbers for zero.

Moments are stored as bf16, rounded stochastically: up or down with the probability that keeps the
mean. The random bits are dropout's hash of the update and of the element's place in the flattened
tensor: its upper half is for m, its lower half for v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _library, choice
from .dropout import _GOLDEN

GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
# Elements that the reference updates at a time: they fit the cache, or fill a launch. Both divide
# 2³², so that the elements of a piece share a random key.
_PIECE = {"cpu": 1 << 16}
_LARGE_PIECE = 1 << 24
_HIGH = -65536  # the upper half of an int32
_NAN = 0x7FC00000


class AdamwFactors(NamedTuple):
    """The factors of an update, see above; ``step`` counts from 1."""

    step: int
    decay: float
    gain1: float  # 1 − β₁
    beta2: float
    gain2: float  # 1 − β₂
    rate: float
    eps: float

    @classmethod
    def of(
        cls, step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> AdamwFactors:
        """Compute the factors of update number ``step``."""
        beta1, beta2 = betas
        root = (1 - beta2**step) ** 0.5
        rate = lr * root / (1 - beta1**step)
        return cls(step, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, rate, eps * root)


@torch.no_grad()
def adamw_(weights: Tensor, gradient: Tensor, pairs: Tensor, factors: AdamwFactors) -> None:
    """Update weights and moments in place.

    Args:
        weights: fp32, contiguous, of any shape.
        gradient: fp32 or bf16, of the same shape.
        pairs: fp32, contiguous, of the same shape. The bits of each number are two bf16: the first
            moment in the upper half, the second in the lower.
        factors: of the update.

    Raises:
        ValueError: a shape, a dtype or a memory format does not fit.
    """
    _check(weights, gradient, pairs)
    if choice.uses_kernel("adamw_", weights):
        torch.ops.swin_moe.adamw_(weights, gradient, pairs, *factors)
        torch.autograd.graph.increment_version((weights, pairs))
    else:
        adamw_reference_(weights, gradient, pairs, factors)


def _check(weights: Tensor, gradient: Tensor, pairs: Tensor) -> None:
    if gradient.dtype not in GRADIENT_DTYPES:
        raise ValueError(f"gradient must be float32 or bfloat16, not {gradient.dtype}")
    for name, tensor in (("weights", weights), ("pairs", pairs)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be float32 and contiguous, but have dtype {tensor.dtype} and strides"
                f" {tensor.stride()}"
            )
    if not weights.shape == gradient.shape == pairs.shape:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, gradient {tuple(gradient.shape)},"
            f" pairs {tuple(pairs.shape)}"
        )


def adamw_reference_(
    weights: Tensor, gradient: Tensor, pairs: Tensor, factors: AdamwFactors
) -> None:
    """Run `adamw_` in PyTorch, in pieces."""
    weights, gradient = weights.view(-1), gradient.reshape(-1)
    bits = pairs.view(-1).view(torch.int32)
    size = _PIECE.get(weights.device.type, _LARGE_PIECE)
    for start in range(0, weights.numel(), size):
        part = slice(start, start + size)
        random = random_bits(factors.step, start, bits[part].numel(), weights.device)
        _update(weights[part], gradient[part].float(), bits[part], random, factors)


def _update(
    weights: Tensor, gradient: Tensor, bits: Tensor, random: Tensor, f: AdamwFactors
) -> None:
    first = bits.bitwise_and(_HIGH).view(torch.float32)
    second = bits.bitwise_left_shift(16).view(torch.float32)
    first += (gradient - first).mul_(f.gain1)
    second.mul_(f.beta2).add_((gradient * f.gain2).mul_(gradient))
    change = (first * f.rate).div_(_root(second).add_(f.eps))
    weights.mul_(f.decay).sub_(change)
    low = _upper(_rounded(second, random))
    torch.bitwise_or(_rounded(first, _upper(random)).bitwise_and_(_HIGH), low, out=bits)


def _root(values: Tensor) -> Tensor:
    """Return the square root, correctly rounded: torch's own in fp32 is not on a CPU with MKL."""
    return values.double().sqrt_().float() if values.device.type == "cpu" else values.sqrt()


def _rounded(values: Tensor, random: Tensor) -> Tensor:
    """Return bits whose upper halves are fp32 values, rounded to bf16 by numbers of 16 bits.

    Inf stays inf, and a NaN is canonical: the sum could carry others into zero.
    """
    nan = values.isnan()
    return values.view(torch.int32).add_(random.bitwise_and(0xFFFF)).masked_fill_(nan, _NAN)


def _upper(bits: Tensor) -> Tensor:
    return bits.bitwise_right_shift(16).bitwise_and_(0xFFFF)


def random_bits(step: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return the random bits [count] int32 of elements from ``start`` on in update ``step``.

    This is the hash of ``ops/dropout.py``, with the update as its seed and 2³² elements as a row.
    """
    row, column = start >> 32, start & 0xFFFFFFFF
    words = torch.tensor([_signed(row ^ step)], dtype=torch.int32)
    key = int(_mix_(_mix_(words).bitwise_xor_(_signed((row ^ step) >> 32))))
    places = torch.arange(count, dtype=torch.int32, device=device)
    return _mix_(places.mul_(_signed(_GOLDEN)).add_(_signed(key + column * _GOLDEN)))


def _mix_(x: Tensor) -> Tensor:
    """Hash int32 in place by "lowbias32"; right shifts are of unsigned numbers."""
    x.bitwise_xor_(_upper(x)).mul_(0x7FEB352D)
    x.bitwise_xor_(x.bitwise_right_shift(15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_(_upper(x))


def _signed(x: int) -> int:
    """Return the int32 with the lowest 32 bits of a number."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def _declared_reference(
    weights: Tensor, gradient: Tensor, pairs: Tensor, step: int, *factors: float
) -> None:
    adamw_reference_(weights, gradient, pairs, AdamwFactors(step, *factors))


_library.declare(
    "adamw_(Tensor(a!) weights, Tensor gradient, Tensor(b!) pairs, int step, float decay,"
    " float gain1, float beta2, float gain2, float rate, float eps) -> ()",
    _declared_reference,
)


@torch.library.register_fake("swin_moe::adamw_")
def _(weights: Tensor, gradient: Tensor, pairs: Tensor, *factors: float) -> None:
    return None
