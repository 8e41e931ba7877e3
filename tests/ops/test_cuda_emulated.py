"""The CUDA kernels of the window attention, run on the CPU by ``tests/cuda_emulation``."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.emulation import Guarded, build_emulation, pointers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the enumeration
# Largest error, relative to the largest number of the tensor.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
MAX_LOG_SCALE = math.log(100.0)
MASK = 0xFFFFFFFF


class Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window_h", ctypes.c_int64),
        ("window_w", ctypes.c_int64),
        ("shift_h", ctypes.c_int64),
        ("shift_w", ctypes.c_int64),
    ]


class Options(ctypes.Structure):
    _fields_ = [("cosine", ctypes.c_bool), ("dropout", ctypes.c_double)]


@dataclass(frozen=True)
class Case:
    batch: int = 1
    size: tuple[int, int] = (8, 8)
    heads: int = 1
    head_dim: int = 16
    window: tuple[int, int] = (4, 4)
    shift: tuple[int, int] = (0, 0)
    cosine: bool = True
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    log_scale: float = 2.0
    offset: int = 0  # of tensors from an aligned address, in elements

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.size[0] // self.window[0]), -(-self.size[1] // self.window[1])

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, *self.size, self.heads, self.head_dim, *self.window, *self.shift)


@dataclass
class Inputs:
    qkv: Tensor
    bias: Tensor
    scale: Tensor
    grad: Tensor
    seed: Tensor


@dataclass
class Outputs:
    out: Tensor
    grad_qkv: Tensor
    grad_bias: Tensor
    grad_scale: Tensor

    def items(self) -> list[tuple[str, Tensor]]:
        return list(vars(self).items())


@dataclass
class Expected:
    outputs: Outputs
    scale_size: Tensor  # of the terms of grad_scale, which may cancel


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    B, (H, W), heads, D, N = case.batch, case.size, case.heads, case.head_dim, case.tokens
    scale = case.log_scale + 0.1 * normal(heads) if case.cosine else D**-0.5 + 0.1 * normal(heads)
    return Inputs(
        qkv=normal(B, H, W, 3, heads, D).to(case.dtype),
        bias=normal(heads, N, N),
        scale=scale,
        grad=normal(B, H, W, heads * D).to(case.dtype),
        seed=torch.tensor([-(2**40) - 12345]),
    )


def regions(length: int, window: int, shift: int) -> Tensor:
    """Return the region of each position of a shifted, padded axis; -1 is padding."""
    padded = -(-length // window) * window
    shifted = torch.arange(padded)
    ids = (shifted >= padded - window).long() + (shifted >= padded - shift).long()
    ids = ids if shift else torch.zeros_like(ids)
    return torch.where((shifted + shift) % padded < length, ids, -1)


def mix(x: Tensor) -> Tensor:
    x = x ^ x >> 16
    x = x * 0x7FEB352D & MASK
    x = x ^ x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def dropout_factors(case: Case, seed: int) -> Tensor:
    """Return the factors [windows, heads, N, N]."""
    windows = case.batch * case.grid[0] * case.grid[1]
    row = torch.arange(windows * case.heads * case.tokens)
    key = mix((row ^ seed) & MASK)
    key = mix(key ^ (row >> 32) & MASK ^ (seed >> 32) & MASK)
    column = torch.arange(case.tokens) * 0x9E3779B9
    u = mix(key[:, None] + column & MASK)
    p = case.dropout
    keep = u >= int(min(p * 2.0**32, 2.0**32 - 1))
    return (keep / (1 - p)).view(windows, case.heads, case.tokens, case.tokens)


def reference(case: Case, inputs: Inputs, dtype: torch.dtype = torch.float64) -> Expected:
    """Compute by autograd, with matrix products in ``dtype`` and the rest in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    qkv = inputs.qkv.to(dtype).requires_grad_()
    bias = inputs.bias.to(wide).requires_grad_()
    windows = case.batch * case.grid[0] * case.grid[1]
    scale = inputs.scale.to(wide).view(1, -1, 1, 1).repeat(windows, 1, case.tokens, 1)
    scale.requires_grad_()
    (H, W), (h, w), (rows, columns) = case.size, case.window, case.grid
    padding = (0, 0, 0, 0, 0, 0, 0, columns * w - W, 0, rows * h - H)
    x = F.pad(qkv, padding).roll((-case.shift[0], -case.shift[1]), (1, 2))
    x = x.view(case.batch, rows, h, columns, w, 3, case.heads, case.head_dim)
    q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3).unbind(0)
    factor = scale
    if case.cosine:
        factor = scale.clamp(max=MAX_LOG_SCALE).exp()
        q, k = (F.normalize(part.to(wide), dim=-1).to(dtype) for part in (q, k))
    row = regions(H, h, case.shift[0]).view(rows, 1, h, 1)
    column = regions(W, w, case.shift[1]).view(1, columns, 1, w)
    region = torch.where((row < 0) | (column < 0), -1, row * 3 + column).flatten(2).flatten(0, 1)
    different = region[:, None] != region[:, :, None]
    mask = torch.where(different, -100.0, 0.0).masked_fill((region < 0)[:, None], -torch.inf)
    logits = (q @ k.transpose(-2, -1)).to(wide) * factor + bias
    logits = logits + mask.to(wide).repeat(case.batch, 1, 1)[:, None]
    probabilities = logits.softmax(-1)
    if case.dropout:
        probabilities = probabilities * dropout_factors(case, int(inputs.seed)).to(wide)
    out = probabilities.to(dtype) @ v
    out = out.view(case.batch, rows, columns, case.heads, h, w, case.head_dim)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
    out = out.roll(case.shift, (1, 2))[:, :H, :W]
    grad_qkv, grad_bias, by_row = torch.autograd.grad(
        out, (qkv, bias, scale), inputs.grad.to(dtype)
    )
    grad_scale = by_row.sum((0, 2, 3))
    return Expected(
        Outputs(out.detach(), grad_qkv, grad_bias, grad_scale), by_row.abs().sum((0, 2, 3))
    )


Kernels = Callable[[Case, Inputs], Outputs]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    names = ("window_attention", "faulty_kernels")
    loaded = build_emulation(tmp_path_factory.mktemp("emulation"), *names)
    loaded.window_attention_supported.restype = ctypes.c_bool
    loaded.window_attention_workspace.restype = ctypes.c_int64
    loaded.window_attention_plain.restype = ctypes.c_bool
    return loaded


def moved(tensor: Tensor, offset: int) -> Tensor:
    place = Guarded(tuple(tensor.shape), tensor.dtype, offset)
    return place.tensor.copy_(tensor)


@pytest.fixture
def kernels(library: ctypes.CDLL) -> Kernels:
    def run(case: Case, inputs: Inputs) -> Outputs:
        def check(error: int) -> None:
            assert error == 0, (error, library.emulation_error().decode())

        shape, options = case.shape, Options(case.cosine, case.dropout)
        dtype = DTYPES.index(case.dtype)
        windows = case.batch * case.grid[0] * case.grid[1]
        qkv, grad = moved(inputs.qkv, case.offset), moved(inputs.grad, case.offset)
        seed = inputs.seed if case.dropout else None
        out = Guarded(tuple(grad.shape), case.dtype, case.offset)
        lse = Guarded((windows, case.heads, case.tokens), torch.float32)
        common = [dtype, ctypes.byref(shape), ctypes.byref(options)]
        arguments = pointers(qkv, inputs.bias, inputs.scale, seed, out.tensor, lse.tensor)
        check(library.window_attention(*common, *arguments))
        size = library.window_attention_workspace(ctypes.byref(shape))
        assert size % 4 == 0
        grads = [
            Guarded(tuple(qkv.shape), case.dtype, case.offset),
            Guarded(tuple(inputs.bias.shape), torch.float32),
            Guarded(tuple(inputs.scale.shape), torch.float32),
        ]
        workspace = Guarded((size // 4,), torch.float32)
        arguments = pointers(
            grad, qkv, inputs.bias, inputs.scale, seed, out.check(), lse.check(),
            *(g.tensor for g in grads), workspace.tensor,
        )  # fmt: skip
        check(library.window_attention_backward(*common, *arguments))
        workspace.check()
        return Outputs(out.tensor, *(g.check() for g in grads))

    return run


def errors(got: Outputs, expected: Expected) -> dict[str, float]:
    """Return each tensor's largest error relative to its largest number, NaN if it has a NaN."""
    result = {}
    pairs = zip(got.items(), expected.outputs.items(), strict=True)
    for (name, x), (_, y) in pairs:
        assert x.shape == y.shape
        if x.numel():
            size = expected.scale_size if name == "grad_scale" else y.abs()
            result[name] = float((x.double() - y).abs().max() / size.max().clamp(min=1e-30))
    return result


def check(case: Case, kernels: Kernels, inputs: Inputs | None = None) -> None:
    inputs = inputs or make_inputs(case)
    expected = reference(case, inputs)
    found = errors(kernels(case, inputs), expected)
    tolerance = TOLERANCE[case.dtype]
    assert all(error < tolerance for error in found.values()), found
    if case.dtype != torch.float32:
        plain = errors(reference(case, inputs, case.dtype).outputs, expected)
        # With few numbers, either may have the smaller rounding error.
        worse = {name for name in found if found[name] > 2 * plain[name] + tolerance / 4}
        assert not worse, (found, plain)


WINDOWS = [
    Case(size=(8, 12), window=(4, 4), heads=3),
    Case(size=(7, 10), window=(4, 4), shift=(2, 2), heads=3, batch=2),
    Case(size=(7, 7), window=(7, 7), head_dim=32, heads=3),
    Case(size=(9, 15), window=(7, 7), shift=(3, 3), head_dim=32, heads=3),
    Case(size=(16, 8), window=(8, 8), shift=(4, 4), head_dim=32, batch=2),
    Case(size=(8, 8), window=(8, 8), head_dim=64),
    Case(size=(12, 24), window=(12, 12), shift=(6, 6), head_dim=32),
    Case(size=(11, 12), window=(12, 12), head_dim=48),
    Case(size=(16, 16), window=(16, 16), head_dim=32),
    Case(size=(15, 16), window=(16, 16), shift=(8, 8), head_dim=64),
    Case(size=(9, 11), window=(4, 6), shift=(2, 3), heads=3, batch=2),
    Case(size=(9, 11), window=(4, 6), shift=(0, 3), head_dim=64),
    Case(size=(3, 5), window=(1, 2), heads=3),
]


def name_of(value: object) -> str:
    if isinstance(value, Case):
        window, shift = (f"{a}x{b}" for a, b in (value.window, value.shift))
        return f"window{window}-shift{shift}-dim{value.head_dim}"
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", WINDOWS, ids=name_of)
def test_windows(kernels: Kernels, case: Case, dtype: torch.dtype, cosine: bool) -> None:
    check(replace(case, dtype=dtype, cosine=cosine), kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.3},
        {"dropout": 0.3, "cosine": False},
        {"log_scale": 4.4},  # factors on both sides of the clamp
        {"log_scale": 6.0, "dropout": 0.3},
        {"offset": 1},  # rows that no vector may load
        {"batch": 0},
    ],
    ids=str,
)
def test_options(kernels: Kernels, change: dict, dtype: torch.dtype) -> None:
    case = Case(size=(9, 15), window=(7, 7), shift=(3, 3), head_dim=32, heads=3, dtype=dtype)
    check(replace(case, **change), kernels)


WHOLE_STRIPS = Case(size=(16, 8), window=(8, 8), heads=3, head_dim=32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dropout": 0.3},
        {"offset": 1},
        {"window": (6, 8)},  # a strip and a half
        {"window": (4, 8), "shift": (2, 3), "size": (9, 13)},  # a strip, masked and padded
        {"window": (12, 8), "shift": (6, 4)},
        {"window": (10, 16), "shift": (5, 8), "heads": 1},  # two warps share 5 strips
        {"window": (10, 16), "size": (10, 16), "heads": 1, "dropout": 0.3},
        {"window": (12, 12), "size": (12, 12), "heads": 1, "offset": 1, "dropout": 0.3},
    ],
    ids=str,
)
def test_instances(kernels: Kernels, change: dict, dtype: torch.dtype) -> None:
    """Plain instances run where they may, others where window, address or option ask for it."""
    check(replace(WHOLE_STRIPS, dtype=dtype, **change), kernels)


def test_idle_warps(kernels: Kernels) -> None:
    """The last blocks have warps without rows, in plain instances as well."""
    check(Case(size=(16, 22), window=(16, 22), dtype=torch.bfloat16), kernels)


def test_choice_of_instances(library: ctypes.CDLL) -> None:
    def plain(case: Case, bias: int = 64, tensor: int = 64) -> bool:
        options = Options(case.cosine, case.dropout)
        addresses = (ctypes.c_void_p(bias), ctypes.c_void_p(tensor))
        return library.window_attention_plain(
            ctypes.byref(case.shape), ctypes.byref(options), *addresses
        )

    assert plain(WHOLE_STRIPS)
    assert plain(replace(WHOLE_STRIPS, size=(15, 9), shift=(4, 4), cosine=False))
    assert not plain(WHOLE_STRIPS, bias=68)
    assert not plain(WHOLE_STRIPS, tensor=66)
    assert not plain(replace(WHOLE_STRIPS, dropout=0.1))
    assert not plain(replace(WHOLE_STRIPS, window=(6, 8)))


def test_quotients(library: ctypes.CDLL) -> None:
    """Division by a product is exact, up to the largest numbers."""
    largest = 2**31 - 1
    for number in (*range(1, 70), 127, 128, 129, 1023, 1024, 46341, 2**30 + 1, largest):
        multiples = [number * times for times in (1, 2, 1000, largest // number)]
        for a in {0, largest, *multiples, *(m - 1 for m in multiples), *range(40)}:
            if a <= largest:
                quotient = library.window_attention_quotient(ctypes.c_int64(number), a)
                assert quotient == a // number, (a, number)


def test_largest_window(kernels: Kernels) -> None:
    check(Case(size=(20, 32), window=(32, 32), dtype=torch.float16), kernels)


def test_groups_of_windows(kernels: Kernels) -> None:
    """There are enough windows and heads that a block sums several windows' bias gradients."""
    case = Case(batch=3, size=(8, 6), window=(3, 6), shift=(1, 3), heads=128, cosine=False)
    check(replace(case, dtype=torch.bfloat16), kernels)


def test_groups_of_large_windows(kernels: Kernels) -> None:
    """The partial sums leave room for two groups of three windows, whose rows two warps share."""
    case = Case(batch=3, size=(10, 16), window=(10, 16), heads=60, dtype=torch.bfloat16)
    check(case, kernels)


def test_logits_beyond_the_mask(kernels: Kernels) -> None:
    """With logits above 100, the additive mask lets keys of other regions through."""
    case = Case(size=(8, 8), window=(8, 8), shift=(4, 4), log_scale=6.0)
    inputs = make_inputs(case)
    q, k, _ = inputs.qkv.unbind(3)
    k[:, :4] = q[:, 4:].flip(1)  # the best keys of the lower half
    k[:, 4:] = -k[:, 4:].abs()
    inputs.bias *= 30
    check(case, kernels, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_zero_and_long_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    """Intermediate gradients of normalised rows stay in the range of fp16."""
    case = Case(size=(4, 4), dtype=dtype)
    inputs = make_inputs(case)
    inputs.qkv[0, 0, 0, :2] = 0  # q and k
    inputs.qkv[0, 1, 1, :2] *= 1000
    inputs.qkv[0, 2, 2, :2] *= 2e-3
    expected, got = reference(case, inputs).outputs, kernels(case, inputs)
    # The gradient of a zero row is that of its normalised row times 1e12: infinite in fp16.
    rest = torch.ones(4, 4, dtype=torch.bool)
    rest[0, 0] = rest[2, 2] = False
    for grad, wanted in ((got.grad_qkv, expected.grad_qkv), (got.out, expected.out)):
        wanted = wanted[0, rest]
        error = (grad[0, rest].double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype]
    error = (got.grad_qkv[0, 2, 2].double() - expected.grad_qkv[0, 2, 2]).abs().max()
    assert error < TOLERANCE[dtype] * expected.grad_qkv[0, 2, 2].abs().max()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "scale", "grad"])
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_numbers_that_are_none(
    kernels: Kernels, dtype: torch.dtype, cosine: bool, where: str, value: float
) -> None:
    """NaN appears where the reference has it, and nowhere else."""
    case = Case(size=(7, 8), shift=(2, 2), heads=2, cosine=cosine, dtype=dtype)
    inputs = make_inputs(case)
    if where in "qkv":
        inputs.qkv[0, 2, 3, "qkv".index(where), 1, 5] = value
    elif where == "bias":
        inputs.bias[1, 2, 3] = value
    elif where == "scale":
        inputs.scale[1] = value
    else:
        inputs.grad[0, 2, 3, 20] = value
    expected, got = reference(case, inputs).outputs, kernels(case, inputs)
    for (name, x), (_, y) in zip(got.items(), expected.items(), strict=True):
        assert torch.equal(x.isfinite(), y.isfinite()), name
        finite = y.isfinite()
        if bool(finite.any()):
            error = (x[finite].double() - y[finite]).abs().max()
            assert error <= 2 * TOLERANCE[dtype] * y[finite].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_order_does_not_matter(kernels: Kernels, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The order of blocks, and of threads between barriers, changes no bit."""
    case = Case(
        batch=2, size=(13, 12), window=(12, 12), shift=(6, 6), heads=3, head_dim=32,
        dropout=0.3, dtype=dtype,
    )  # fmt: skip
    inputs = make_inputs(case)
    first = kernels(case, inputs)
    library.emulation_reverse(True)
    try:
        second = kernels(case, inputs)
    finally:
        library.emulation_reverse(False)
    for (name, x), (_, y) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("case", "supported"),
    [
        (Case(head_dim=48), True),
        (Case(window=(32, 32)), True),
        (Case(window=(33, 32)), False),
        (Case(head_dim=24), False),
        (Case(head_dim=80), False),
        (Case(batch=2**31), False),
    ],
)
def test_supported(library: ctypes.CDLL, case: Case, supported: bool) -> None:
    assert library.window_attention_supported(ctypes.byref(case.shape)) == supported


FAULTS = {
    1: "waits forever in __syncthreads",
    2: "shfl meets __syncwarp",
    3: "a row of a matrix is misaligned",
    4: "copies are not waited for",
    5: "shared memory overflows",
}


def test_emulation_finds_faults(library: ctypes.CDLL) -> None:
    out = torch.empty(64)
    right = torch.arange(63.0, -1.0, -1.0)

    def run(index: int) -> bool:
        return library.run_faulty(index, *pointers(out)) == 0

    assert run(0)
    assert torch.equal(out, right)
    for index, error in FAULTS.items():
        assert not run(index)
        assert error in library.emulation_error().decode()
        assert run(0)
    assert run(6)
    assert bool(out.isnan().any()), "a read before the write is a NaN"
