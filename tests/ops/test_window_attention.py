"""Window attention: the reference against a plain loop, the kernels against the reference in fp64.

Odd values, dropout and the instruction sets are in test_window_attention_values.py; errors,
layouts, compilation and memory in test_window_attention_api.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from swin_moe import ops
from swin_moe.ops import _library
from swin_moe.ops.window_reference import (
    MAX_LOG_SCALE,
    Windows,
    attention_reference,
    backward_reference,
    forward_reference,
)
from tests.ops import devices

needs_library = devices.needs_library("window_attention")
needs_cuda = devices.needs_cuda("window_attention")
DEVICES = devices.devices("window_attention")
DTYPES = [torch.float32, torch.bfloat16]
PLACES = [("cpu", dtype) for dtype in DTYPES] + [
    pytest.param("cuda", dtype, marks=needs_cuda) for dtype in _library.KERNEL_DTYPES["cuda"]
]
RESULTS = ("out", "grad_qkv", "grad_bias", "grad_scale")
# Largest error, relative to the largest number of the tensor, that is always accepted.
FLOOR = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
SCALE_FLOOR = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # terms cancel


@dataclass(frozen=True)
class Case:
    window: tuple[int, int] = (4, 4)
    shift: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (8, 8)
    batch: int = 2
    heads: int = 3
    head_dim: int = 32
    scale: float = 2.3  # of the last head; others have less
    cosine: bool = True
    dropout: float = 0.0

    def __str__(self) -> str:
        window, shift, size = ("x".join(map(str, x)) for x in (self.window, self.shift, self.size))
        kind = f"cosine{self.scale:g}" if self.cosine else "plain"
        dropout = f"-dropout{self.dropout:g}" if self.dropout else ""
        return (
            f"w{window}-s{shift}-{self.batch}x{size}-h{self.heads}x{self.head_dim}-{kind}{dropout}"
        )

    @property
    def windows(self) -> Windows:
        return Windows(self.window, self.shift, self.cosine, self.dropout)

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    def inputs(self, dtype=torch.float32, device="cpu") -> list[Tensor]:
        """Return qkv in the dtype, a bias as large as V2's, and a different scale for each head."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, *self.size, 3, self.heads, self.head_dim)
        qkv = torch.randn(shape, generator=generator).to(dtype)
        bias = 16 * torch.rand(self.heads, self.tokens, self.tokens, generator=generator)
        last = self.scale if self.cosine else self.head_dim**-0.5
        scale = last - 0.1 * torch.arange(self.heads).flip(0) / max(1, self.heads - 1)
        return [x.to(device) for x in (qkv, bias, scale.view(-1, 1, 1))]

    def fused(self, qkv: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        torch.manual_seed(5)
        return ops.window_attention(
            qkv,
            bias,
            scale,
            window_size=self.window,
            shift_size=self.shift,
            cosine=self.cosine,
            dropout_p=self.dropout,
        )

    def reference(self, qkv: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (1,), device=qkv.device)  # as the op draws it
        return attention_reference(qkv, bias, scale, seed, self.windows)


def run(function, inputs: list[Tensor]) -> list[Tensor]:
    """Return output and all three gradients, for a gradient that varies by element."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(weight.to(out))
    return [out.detach(), *(x.grad for x in inputs)]


def floor(name: str, dtype: torch.dtype, case: Case) -> float:
    """Return the error of rounding; logits near 100, at the clamp, lose two more digits."""
    sharp = case.cosine and case.scale > 4
    if name == "grad_scale":
        return SCALE_FLOOR[dtype] * (4 if sharp else 1)
    return FLOOR[dtype] * (4 if sharp and dtype == torch.float32 else 1)


def error(actual: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    largest = exact.abs().max().item()
    return (actual.double() - exact).abs().max().item() / max(largest, 1e-30)


def check_parity(case: Case, dtype=torch.float32, device="cpu") -> None:
    """Check that each result of the op differs from fp64 only by rounding.

    In fp32 the bound is the reference's error in the same dtype. In half precision the reference
    rounds unit vectors and the kernels do not: their bound is fixed.
    """
    inputs = case.inputs(dtype, device)
    fused = run(case.fused, inputs)
    same = run(case.reference, inputs)
    exact = run(case.reference, [x.double() for x in inputs])
    for name, mine, theirs, wanted in zip(RESULTS, fused, same, exact, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        limit = floor(name, dtype, case)
        if dtype == torch.float32:
            limit = max(2 * error(theirs, wanted), limit)
        assert error(mine, wanted) <= limit, f"{name}: {error(mine, wanted):.1e} > {limit:.1e}"


def plain_loop(qkv: Tensor, bias: Tensor, scale: Tensor, windows: Windows) -> Tensor:
    """Compute the definition cell by cell, in Python numbers."""
    (B, H, W, _, heads, d), data = qkv.shape, qkv.tolist()
    (wh, ww), (sh, sw) = windows.size, windows.shift
    padded_h, padded_w = math.ceil(H / wh) * wh, math.ceil(W / ww) * ww
    out = torch.full((B, H, W, heads, d), float("nan"), dtype=qkv.dtype)

    def read(b, place, part, h):
        row = data[b][place[0]][place[1]][part][h]
        if part == 2 or not windows.cosine:
            return row
        norm = max(math.sqrt(sum(x * x for x in row)), 1e-12)
        return [x / norm for x in row]

    tops, lefts = range(0, padded_h, wh), range(0, padded_w, ww)
    for b, top, left, h in itertools.product(range(B), tops, lefts, range(heads)):
        # A cell is its place before the shift, and whether the shift moved it across the edge.
        cells = []
        for y, x in itertools.product(range(top, top + wh), range(left, left + ww)):
            place = ((y + sh) % padded_h, (x + sw) % padded_w)
            cells.append((place, (y + sh >= padded_h, x + sw >= padded_w)))
        factor = scale[h].item()
        if windows.cosine:
            factor = math.exp(min(factor, math.log(100)))
        for i, (place, side) in enumerate(cells):
            if place[0] >= H or place[1] >= W:
                continue
            query, weights, values = read(b, place, 0, h), [], []
            for j, (other, other_side) in enumerate(cells):
                if other[0] >= H or other[1] >= W:
                    continue  # a logit of minus infinity
                dot = sum(a * c for a, c in zip(query, read(b, other, 1, h), strict=True))
                mask = 0.0 if side == other_side else -100.0
                weights.append(math.exp(dot * factor + bias[h, i, j].item() + mask))
                values.append(read(b, other, 2, h))
            for c in range(d):
                total = sum(w * v[c] for w, v in zip(weights, values, strict=True))
                out[b, place[0], place[1], h, c] = total / sum(weights)
    return out.flatten(3)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize(
    ("window", "shift", "size"),
    [
        ((2, 2), (0, 0), (4, 6)),
        ((2, 2), (1, 1), (4, 4)),
        ((2, 3), (1, 2), (5, 7)),
        ((3, 2), (0, 1), (4, 3)),
        ((4, 4), (2, 0), (3, 6)),
        ((4, 3), (3, 1), (2, 2)),
    ],
)
def test_reference_equals_a_plain_loop(window, shift, size, cosine):
    case = Case(window, shift, size, heads=2, head_dim=3, scale=1.5, cosine=cosine)
    inputs = [x.double() for x in case.inputs()]
    inputs[1] -= 80.0 * (inputs[1] > 8)  # as large as the mask: other regions show through
    expected = plain_loop(*inputs, case.windows)
    torch.testing.assert_close(case.reference(*inputs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("cosine", [True, False])
def test_fp64_gradcheck(cosine, dropout):
    shape = Case((2, 3), (1, 2), (3, 5), 1, 2, 3, 1.0, cosine, dropout)
    inputs = [x.double().requires_grad_() for x in shape.inputs()]
    assert torch.autograd.gradcheck(shape.fused, inputs)
    seed = torch.tensor([2**62 + 12345])
    assert torch.autograd.gradcheck(
        lambda *x: attention_reference(*x, seed, shape.windows), inputs, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(shape.reference, inputs, fast_mode=True)


@pytest.mark.parametrize("scale", [1.0, 4.65])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("cosine", [True, False])
def test_backward_reference_equals_autograd(cosine, dropout, scale):
    """The kernels' formulas, which the op runs without a kernel, equal autograd."""
    case = Case((2, 3), (1, 2), (3, 5), 2, 3, 5, scale, cosine, dropout)
    inputs = [x.double() for x in case.inputs()]
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    expected = run(lambda *x: attention_reference(*x, seed, case.windows), inputs)
    weight = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(2)).double()
    out, lse = forward_reference(*inputs, seed, case.windows)
    grads = backward_reference(weight, *inputs, seed, out, lse, case.windows)
    for mine, theirs in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


# Every window, shift, head width, number of heads and batch at least once, not every combination.
CASES = [
    Case(),
    Case((4, 4), (2, 2), (13, 10), 1, 1, 16, scale=4.6),
    Case((4, 4), (2, 2), (44, 40), 2, 5, 16),  # many groups of windows, heads in groups of 3 and 2
    Case((4, 4), (3, 3), (3, 2), 2, 3, 32),  # a map smaller than the window
    Case((4, 6), (2, 3), (10, 13), 2, 3, 48, dropout=0.3),
    Case((6, 4), (0, 3), (12, 9), 1, 3, 16, cosine=False),
    Case((1, 8), (0, 4), (5, 20), 2, 3, 64),
    Case((2, 2), (1, 1), (6, 5), 2, 3, 32),
    Case((7, 7), (3, 3), (14, 21), 2, 3, 32),
    Case((7, 7), (3, 3), (15, 9), 1, 4, 32, cosine=False),
    Case((7, 7), (0, 0), (14, 14), 1, 48, 32),
    Case((7, 7), (3, 3), (10, 14), 0, 3, 32),
    Case((7, 7), (3, 0), (14, 7), 2, 3, 64, cosine=False, dropout=0.2),
    Case((8, 8), (4, 4), (16, 24), 1, 3, 48, scale=5.0),
    Case((8, 8), (0, 0), (8, 16), 2, 1, 64, cosine=False),
    Case((8, 8), (4, 4), (24, 20), 0, 1, 16, cosine=False, dropout=0.5),
    Case((12, 12), (6, 6), (24, 20), 1, 3, 32),
    Case((12, 12), (0, 0), (12, 24), 1, 3, 16, scale=4.6),
    Case((16, 16), (8, 8), (32, 16), 1, 3, 32, scale=4.65),  # one of three heads is clamped
    Case((16, 16), (8, 8), (20, 16), 1, 1, 64, cosine=False, dropout=0.1),
    Case((24, 24), (12, 12), (48, 24), 1, 1, 32, scale=4.6),
    Case((24, 24), (0, 0), (24, 24), 1, 2, 16),
    Case((32, 32), (16, 16), (33, 20), 1, 1, 16),
]


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_forward_and_backward(case, dtype, device):
    """Without the library, the op's own formulas are compared with autograd's."""
    check_parity(case, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_above_the_clamp_the_scale_has_no_gradient(device):
    case = Case(scale=5.0, shift=(2, 2))
    for last in (4.65, 5.0, 90.0):
        case = replace(case, scale=last)
        _, bias, scale = inputs = case.inputs(device=device)
        grad = run(case.fused, inputs)[3]
        assert ((grad == 0) == (scale > MAX_LOG_SCALE)).all()
    clamped = torch.full_like(scale, 5.0)
    assert torch.equal(
        case.fused(inputs[0], bias, clamped), case.fused(inputs[0], bias, clamped + 90)
    )


@needs_library
@pytest.mark.parametrize("cosine", [True, False])
def test_statistics_are_those_of_the_reference(cosine):
    case = Case((7, 7), (3, 3), (10, 16), cosine=cosine)
    qkv, bias, scale = case.inputs()
    numbers = (*case.window, *case.shift, cosine, 0.0)
    out, lse = torch.ops.swin_moe.window_attention(qkv, bias, scale.flatten(), None, *numbers)
    expected, expected_lse = forward_reference(qkv, bias, scale, None, case.windows)
    real = case.windows.split(torch.ones(2, *case.size, 1)).flatten(0, 1).view(-1, 1, case.tokens)
    real = real.bool().expand_as(lse)  # a padded query's number is unused
    torch.testing.assert_close(lse[real], expected_lse[real], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_for_any_number_of_threads(dtype):
    threads = torch.get_num_threads()
    try:
        for case in (
            Case((4, 4), (2, 2), (42, 40), 2, 5, 32, dropout=0.2),
            Case((7, 7), (3, 3), (28, 21), 2, 3, 32),
        ):
            results = []
            for count in (1, 1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(run(case.fused, case.inputs(dtype)))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)
