"""Inputs of AdamW with bf16 moments, and the comparison of a kernel with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from swin_moe import ops
from swin_moe.ops import AdamwFactors

RATES = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
FACTORS = AdamwFactors.of(7, **RATES)  # type: ignore[arg-type]
# Nothing, one element, around a vector of every width, more than a piece of the reference.
SIZES = [0, 1, 3, 4, 5, 15, 16, 17, 31, 33, 1000, 65_537, 140_003]
# Elements from an aligned address to weights, gradient and pairs.
OFFSETS = [(0, 0, 0), (1, 1, 1), (4, 2, 0), (0, 1, 0), (3, 0, 8)]


def inputs(size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, gradient and pairs of moments, in a wide range."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        exponent = torch.empty(size).uniform_(low, high, generator=generator)
        return torch.randn(size, generator=generator) * 10**exponent

    weights, gradient = draw(-2, 0), draw(-6, 1).to(dtype)
    first, second = draw(-6, 1).bfloat16(), draw(-12, 2).abs().bfloat16()
    pairs = torch.stack([second, first], 1).view(torch.float32).view(-1)
    return weights, gradient, pairs


def moments(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the second moments in fp32."""
    second, first = pairs.view(torch.bfloat16).view(-1, 2).float().unbind(1)
    return first, second


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bf16 numbers next to fp32 values, towards zero and away from it, as fp32."""
    bits = values.view(torch.int32) & -65536
    return bits.view(torch.float32), (bits + 65536).view(torch.float32)


def reference(weights: Tensor, gradient: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reference's new weights and pairs."""
    weights, pairs = weights.clone(), pairs.clone()
    ops.adamw_reference_(weights, gradient, pairs, FACTORS)
    return weights, pairs


def compare(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Assert that weights and pairs are equal to the bit."""
    for name, one, other in zip(("weights", "pairs"), found, expected, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), name


def placed(tensor: Tensor, offset: int, device: str = "cpu") -> Tensor:
    """Return a copy that begins ``offset`` elements after an aligned address."""
    place = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=device)[offset:]
    return place.copy_(tensor)


def check_all(dtype: torch.dtype, device: str) -> None:
    """Compare the kernel with the reference at every size and alignment."""
    for size in SIZES:
        for offsets in OFFSETS if size <= 1000 else OFFSETS[:2]:
            pairs_of = zip(inputs(size, dtype, seed=size), offsets, strict=True)
            tensors = [placed(tensor, offset, device) for tensor, offset in pairs_of]
            expected = reference(*tensors)
            ops.adamw_(tensors[0], tensors[1], tensors[2], FACTORS)
            compare((tensors[0], tensors[2]), expected)
