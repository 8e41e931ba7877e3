"""Window attention: the reference against a plain loop, the kernels against the reference in fp64.

What is not numbers (errors, autograd, compilation, memory) is in test_window_attention_api.py.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

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

BUILT = ops.status()["window_attention"].startswith("fused (cpu")
needs_library = pytest.mark.skipif(
    not BUILT, reason=f"the compiled library is not built; {_library.BUILD_HINT}"
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in ops.status()["window_attention"],
    reason="no GPU, or the CUDA kernels are not built",
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
DTYPES = [torch.float32, torch.bfloat16]
PLACES = [("cpu", dtype) for dtype in DTYPES] + [
    pytest.param("cuda", dtype, marks=needs_cuda) for dtype in _library.KERNEL_DTYPES["cuda"]
]
RESULTS = ("out", "grad_qkv", "grad_bias", "grad_scale")
# Largest error, relative to the largest number of the tensor, that is never held against a kernel.
FLOOR = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SCALE_FLOOR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # terms cancel


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
        """qkv in the dtype, bias as large as V2 makes it, scale from head to head another."""
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
    """Output and all three gradients, for a gradient that varies from element to element."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(weight.to(out))
    return [out.detach(), *(x.grad for x in inputs)]


def error(actual: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    largest = exact.abs().max().item()
    return (actual.double() - exact).abs().max().item() / max(largest, 1e-30)


def check_parity(case: Case, dtype=torch.float32, device="cpu") -> None:
    """No result of the op is further from fp64 than rounding explains.

    In fp32 that is what the reference loses, in the same dtype. In half precision the reference
    rounds unit vectors and the kernels do not: they are held to a bound of their own.
    """
    inputs = case.inputs(dtype, device)
    fused = run(case.fused, inputs)
    same = run(case.reference, inputs)
    exact = run(case.reference, [x.double() for x in inputs])
    for name, mine, theirs, wanted in zip(RESULTS, fused, same, exact, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        floor = (SCALE_FLOOR if name == "grad_scale" else FLOOR)[dtype]
        limit = max(3 * error(theirs, wanted), floor) if dtype == torch.float32 else floor
        assert error(mine, wanted) <= limit, f"{name}: {error(mine, wanted):.1e} > {limit:.1e}"


def plain_loop(qkv: Tensor, bias: Tensor, scale: Tensor, windows: Windows) -> Tensor:
    """The definition, cell by cell, in Python numbers."""
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
        # A cell is where it was before the shift, and whether the shift took it round the edge.
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
    inputs[1] -= 80.0 * (inputs[1] > 8)  # as far as the mask goes: other regions show through
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
    """The formulas of the kernels, as the op runs them where there is no kernel."""
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
    Case((16, 16), (8, 8), (32, 16), 1, 3, 32, scale=4.65),  # of three heads, one is clamped
    Case((16, 16), (8, 8), (20, 16), 1, 1, 64, cosine=False, dropout=0.1),
    Case((24, 24), (12, 12), (48, 24), 1, 1, 32, scale=4.6),
    Case((24, 24), (0, 0), (24, 24), 1, 2, 16),
    Case((32, 32), (16, 16), (33, 20), 1, 1, 16),
]


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_forward_and_backward(case, dtype, device):
    """Holds without the library too: then it compares the op's own formulas with autograd's."""
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
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


ISA_CASES = [
    Case((7, 7), (3, 3), (15, 9), 1, 4, 32, cosine=False),
    Case((4, 6), (2, 3), (10, 13), 2, 3, 48, dropout=0.3),
    Case((8, 8), (4, 4), (16, 12), 1, 1, 64, scale=4.6),
    Case((12, 12), (6, 6), (24, 20), 1, 2, 16),
]


def in_process(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    """Runs code where the kernels, which are chosen once per process, are those of `isa`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "SWIN_MOE_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_library
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_parity_of_every_instruction_set(isa):
    code = f"""
import torch
from tests.ops.test_window_attention import DTYPES, ISA_CASES, check_nan_places, check_parity
used = torch.ops.swin_moe.cpu_instruction_set(True)
print("used", used)
if used == {isa!r}:
    assert torch.ops.swin_moe.cpu_instruction_set(False) == used.removesuffix("_bf16")
    for dtype in DTYPES:
        for case in ISA_CASES:
            check_parity(case, dtype)
        for cosine in (True, False):
            check_nan_places(cosine, dtype)
    print("done")
"""
    result = in_process(code, isa)
    assert result.returncode == 0, result.stderr
    if f"used {isa}\n" not in result.stdout:
        pytest.skip(f"this processor lacks {isa}: {result.stdout.strip()}")
    assert result.stdout.endswith("done\n")


@needs_library
def test_an_unknown_instruction_set_is_an_error():
    code = """
import torch
from tests.ops.test_window_attention import Case
try:
    Case().fused(*Case().inputs())
except RuntimeError as error:
    print(error)
"""
    result = in_process(code, "avx1024")
    assert result.returncode == 0, result.stderr
    assert "SWIN_MOE_ISA must be avx512_bf16, avx512, avx2 or generic" in result.stdout


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


def same_window(case: Case, row: int, column: int) -> Tensor:
    """[H, W] where a token's own window is, for maps without padding."""
    number = torch.arange(case.size[0] * case.size[1]).view(1, *case.size, 1)
    windows = case.windows.split(number).squeeze(-1)  # [1, nW, N]
    own = windows[(windows == number[0, row, column]).any(-1)]
    return torch.isin(number[0, :, :, 0], own)


def check_nan_places(cosine: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    """A NaN shows where it must and nowhere else, and everything else keeps every bit."""
    for case in (
        Case((4, 4), (2, 2), (8, 12), cosine=cosine),
        Case((7, 7), (3, 3), (14, 14), cosine=cosine, dropout=0.2),
    ):
        image, row, column, head, channel = 1, 5, 3, 1, 9
        window = same_window(case, row, column)
        for part, value in itertools.product(range(3), (float("nan"), float("inf"))):
            qkv, bias, scale = case.inputs(dtype, device)
            clean = run(case.fused, [qkv, bias, scale])
            qkv[image, row, column, part, head, channel] = value
            dirty = run(case.fused, [qkv, bias, scale])
            expected = torch.zeros_like(clean[0], dtype=torch.bool).unflatten(3, (case.heads, -1))
            if part == 0:
                expected[image, row, column, head] = True
            elif part == 1:
                expected[image, window, head] = True
            else:
                expected[image, window, head, channel] = True
            expected = expected.flatten(3)
            changed = dirty[0] != clean[0]
            assert not (changed & ~expected).any()
            reference = case.reference(qkv, bias, scale)
            if value != value:
                assert torch.equal(reference.isnan(), expected)
                assert torch.equal(dirty[0].isnan(), expected)
            elif part < 2:
                assert torch.equal(dirty[0].isnan(), reference.isnan())
            touched = torch.zeros_like(dirty[1], dtype=torch.bool)
            touched[image, window, :, head] = True
            assert not ((dirty[1] != clean[1]) & ~touched).any()
            others = torch.arange(case.heads) != head
            for grad, before in zip(dirty[2:], clean[2:], strict=True):
                assert torch.equal(grad[others], before[others])


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("cosine", [True, False])
def test_a_nan_shows_where_it_must_and_nowhere_else(cosine, dtype, device):
    check_nan_places(cosine, dtype, device)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("cosine", [True, False])
def test_non_finite_bias_and_scale(cosine, dtype, device):
    case = Case((4, 4), (2, 2), (10, 8), cosine=cosine)
    nan, inf = float("nan"), float("inf")
    for name, place, value in [
        ("bias", (1, 3, 5), nan),
        ("bias", (1, 3, 5), inf),
        ("bias", (1, 3), -inf),  # no key is left
        ("scale", (1,), nan),
        ("scale", (1,), inf),
        ("scale", (1,), -inf),
    ]:
        qkv, bias, scale = inputs = case.inputs(dtype, device)
        clean = case.fused(*inputs)
        (bias if name == "bias" else scale)[place] = value
        out, reference = case.fused(*inputs), case.reference(*inputs)
        assert torch.equal(out.isnan(), reference.isnan()), (name, place, value)
        same = (out == clean).unflatten(3, (case.heads, -1))
        assert same[:, :, :, [0, 2]].all(), (name, place, value)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("window", [4, 7])
@pytest.mark.parametrize("cosine", [True, False])
def test_a_bias_of_minus_infinity_is_a_mask(cosine, window, dtype, device):
    """As if the key were not there: its own gradients are zero, and its value does not matter."""
    case = Case((window, window), (1, 1), (2 * window, window), cosine=cosine)
    qkv, bias, scale = case.inputs(dtype, device)
    bias[:, :, 2::3] = float("-inf")
    bias[1, :, 0] = float("-inf")
    fused = run(case.fused, [qkv, bias, scale])
    exact = run(case.reference, [x.double() for x in (qkv, bias, scale)])
    assert fused[2][:, :, 2::3].abs().max() == 0
    for name, mine, wanted in zip(RESULTS, fused, exact, strict=True):
        limit = (SCALE_FLOOR if name == "grad_scale" else FLOOR)[dtype]
        assert error(mine, wanted) <= limit, name
    hidden = qkv.clone()
    tokens = torch.arange(case.size[0] * case.size[1]).view(1, *case.size, 1)
    masked = case.windows.split(tokens)[0, :, 2::3].flatten()
    hidden.flatten(1, 2)[:, masked, 1:] = 3.0
    torch.testing.assert_close(case.fused(hidden, bias, scale), fused[0])


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("window", [4, 7, 12])
@pytest.mark.parametrize("cosine", [True, False])
def test_large_logits(cosine, window, dtype, device):
    """Bias in steps of 16 at the largest scale, and dot products in the hundreds."""
    case = Case((window, window), (2, 2), (2 * window, window), 1, 2, 32, 5.0, cosine)
    qkv, bias, scale = case.inputs(dtype, device)
    bias = 16.0 * bias.round()
    qkv[:, :, :, :2] *= 1 if cosine else 6
    results = run(case.fused, [qkv, bias, scale])
    assert all(x.isfinite().all() for x in results)
    exact = case.reference(*(x.double() for x in (qkv, bias, scale)))
    assert error(results[0], exact) <= {torch.float32: 1e-4}.get(dtype, 2e-2)


# The number of tokens of windows of 7 is no multiple of a tile of rows, that of 4 and 8 is.
@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("window", [4, 7, 8])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("level", [-1000.0, -180.0, -100.0, 100.0, 1000.0])
def test_all_logits_of_a_query_may_be_moved_together(level, cosine, window, dtype, device):
    """Softmax does not see it; fp32 loses a few bits of the logits."""
    case = Case((window, window), (0, 0), (window, window), 1, 2, 16, 1.0, cosine)
    qkv, bias, scale = case.inputs(dtype, device)
    fused = run(case.fused, [qkv, bias / 8 + level, scale])
    exact = run(case.reference, [x.double() for x in (qkv, bias / 8 + level, scale)])
    for name, mine, wanted in zip(RESULTS, fused, exact, strict=True):
        floor = (SCALE_FLOOR if name == "grad_scale" else FLOOR)[dtype]
        assert error(mine, wanted) <= max(floor, 5e-4), name


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros_have_no_direction(device):
    case = Case((4, 4), (2, 2), (8, 8))
    qkv, bias, scale = case.inputs(device=device)
    qkv[0, 1, 2, :2], qkv[1, 3, 0, 0] = 0.0, 1e-14
    fused = run(case.fused, [qkv, bias, scale])
    exact = run(case.reference, [x.double() for x in (qkv, bias, scale)])
    for name, mine, wanted in zip(RESULTS, fused, exact, strict=True):
        assert error(mine, wanted) <= 1e-5, name
    moderate = exact[1].abs() < 1e6  # beside gradients of 10^12 nothing else shows
    assert error(fused[1][moderate], exact[1][moderate]) <= 1e-5


def dropout_mask(case: Case, dtype=torch.float32, device="cpu", function=None) -> Tensor:
    """[B, H, W, heads, N]: what each probability was multiplied by, shown by values of e_j."""
    qkv, bias, scale = case.inputs(dtype, device)
    unit = torch.eye(case.tokens).view(case.tokens, 1, case.tokens)
    one_window = unit.expand(-1, case.heads, -1).unflatten(0, case.window)
    rows, columns = (n // w for n, w in zip(case.size, case.window, strict=True))
    qkv[:, :, :, :2] = 0
    qkv[:, :, :, 2] = one_window.repeat(rows, columns, 1, 1).to(qkv)
    out = (function or case.fused)(qkv, 0 * bias, scale)
    return (out.float() * case.tokens).unflatten(3, (case.heads, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_drops_what_the_reference_drops(p, device):
    case = Case((4, 4), (0, 0), (16, 16), head_dim=16, dropout=p, cosine=False)
    mask = dropout_mask(case, device=device)
    torch.testing.assert_close(mask, dropout_mask(case, device=device, function=case.reference))
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 0.015  # five standard deviations
    # Heads, images, windows, queries and keys have draws of their own.
    halves = [x.chunk(2, dim) for dim, x in enumerate((kept,) * 4) if dim < 3]
    halves += [(kept[:, :, :, 0], kept[:, :, :, 1]), (kept[..., 1:], kept[..., :-1])]
    halves += [(kept[:, :, 1:], kept[:, :, :-1])]
    for one, other in halves:
        assert abs((one == other).float().mean() - (p**2 + (1 - p) ** 2)) < 0.03


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_follows_the_generator(device):
    case = Case(dropout=0.5)
    qkv, bias, scale = case.inputs(device=device)

    def draw():
        return ops.window_attention(qkv, bias, scale, window_size=4, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    state = torch.get_rng_state()
    ops.window_attention(qkv, bias, scale, window_size=4)  # without dropout nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
def test_dropout_of_everything(dtype, device):
    results = run(Case(dropout=1.0).fused, Case(dropout=1.0).inputs(dtype, device))
    assert all((x == 0).all() for x in results)
