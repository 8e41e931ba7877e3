"""The CUDA kernels between the experts' products, run on the CPU by ``tests/cuda_emulation``.

They are compared with a loop in fp64. Buffers start as NaNs between margins that must not be
written.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from swin_moe.ops.dropout import keep_mask
from tests.ops.emulation import EMULATION, KERNELS, Guarded, pointers
from tests.ops.test_cuda_emulated import DTYPES, moved

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SEED = torch.tensor([-(2**40) - 12345])


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "experts", "width", "hidden", "stride")]


@dataclass(frozen=True)
class Case:
    used: tuple[int, ...] = (7, 0, 70)
    stride: int = 0
    spare: int = 0  # rows after the last expert's
    width: int = 40
    hidden: int = 272
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    offset: int = 0  # of tensors from an aligned address, in elements

    @property
    def rows(self) -> int:
        return (len(self.used) * self.stride or sum(self.used)) + self.spare

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, len(self.used), self.width, self.hidden, self.stride)

    def slices(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield each expert, its rows, and its empty rows."""
        row = 0
        for expert, count in enumerate(self.used):
            end = row + (self.stride or count)
            yield expert, slice(row, row + count), slice(row + count, end)
            row = end


CASES = [
    Case(),
    Case(used=(130,), spare=3),
    Case(used=(0, 0, 64, 1), width=7, hidden=33),
    Case(used=(5, 0, 80), stride=80),
    Case(used=(64, 65), stride=70, spare=9, width=8, hidden=24),
    Case(used=(0, 0)),
    Case(used=(0, 0), stride=3),
    Case(used=(20, 30), offset=1),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("emulation") / "experts.so"
    flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-I", str(EMULATION)]
    flags += [
        "-Wall",
        "-Wno-unknown-pragmas",
        "-DSWIN_MOE_CUDA_EMULATION",
        "-include",
        "cuda_runtime.h",
    ]
    sources = [EMULATION / "experts" / "moe_activation.cpp", KERNELS / "moe_activation.cu"]
    subprocess.run([compiler, *flags, "-x", "c++", *map(str, sources), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.emulation_error.restype = ctypes.c_char_p
    loaded.experts_workspace.restype = ctypes.c_int64
    return loaded


Call = Callable[..., None]


@pytest.fixture
def call(library: ctypes.CDLL) -> Call:
    def run(case: Case, name: str, *arguments: object) -> None:
        used = torch.tensor(case.used)
        values = [pointers(a)[0] if a is None or isinstance(a, Tensor) else a for a in arguments]
        common = (DTYPES.index(case.dtype), ctypes.byref(case.shape), *pointers(used))
        error = getattr(library, name)(*common, *values)
        assert error == 0, (error, library.emulation_error().decode())

    return run


def normal(case: Case, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return moved(torch.randn(shape, generator=generator).to(case.dtype), case.offset)


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    if wanted.numel():
        error = (found.double() - wanted).abs().max()
        assert error <= TOLERANCE[dtype] * wanted.abs().max().clamp(min=1e-30), float(error)


def activation(case: Case, call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    H, E = case.hidden, len(case.used)
    bias, pre = normal(case, E, H, seed=2), normal(case, case.rows, H, seed=3)
    seed = SEED if case.dropout else None
    act = Guarded((case.rows, H), case.dtype, case.offset)
    common = (bias, seed, ctypes.c_double(case.dropout), pre, act.tensor)
    if grad is None:
        call(case, "activation", *common)
        return {"act": act.check()}
    grads = Guarded((case.rows, H), case.dtype, case.offset)
    grads.tensor.copy_(grad)
    sums = Guarded((E, H), case.dtype, case.offset)
    workspace = Guarded((most_units(case) * H,), torch.float32)
    call(case, "activation_backward", *common, grads.tensor, sums.tensor, workspace.tensor)
    workspace.check()
    return {"act": act.check(), "grad": grads.check(), "sums": sums.check()}


def most_units(case: Case) -> int:
    E = len(case.used)
    return E * -(-case.stride // 64) if case.stride else case.rows // 64 + E


def expected(case: Case, grad: Tensor) -> dict[str, Tensor]:
    H, E = case.hidden, len(case.used)
    bias, pre = normal(case, E, H, seed=2).double(), normal(case, case.rows, H, seed=3).double()
    kept = keep_mask(SEED, torch.arange(case.rows), H, case.dropout) if case.dropout else 1.0
    row_bias = torch.zeros(case.rows, H, dtype=torch.float64)
    for expert, own, _ in case.slices():
        row_bias[own] = bias[expert]
    x = (pre + row_bias).requires_grad_()
    act = x * torch.special.erfc(-x * 0.5**0.5) / 2 * kept
    act.backward(grad.double())
    sums = torch.stack([x.grad[own].sum(0) for _, own, _ in case.slices()])
    return {"act": act.detach(), "grad": x.grad, "sums": sums}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.used}-{case.stride}")
def test_activation(call: Call, case: Case, dtype: torch.dtype, dropout: float) -> None:
    case = replace(case, dtype=dtype, dropout=dropout)
    grad = normal(case, case.rows, case.hidden)
    wanted = expected(case, grad)
    forward, backward = activation(case, call), activation(case, call, grad)
    check(backward["sums"], wanted["sums"], dtype)
    for _, own, empty in case.slices():
        check(forward["act"][own], wanted["act"][own], dtype)
        assert torch.equal(forward["act"][own], backward["act"][own])
        check(backward["grad"][own], wanted["grad"][own], dtype)
        assert forward["act"][empty].isnan().all(), "empty rows are nobody's"
        assert not backward["act"][empty].any()
        assert not backward["grad"][empty].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.used}-{case.stride}")
def test_rows(call: Call, case: Case, dtype: torch.dtype) -> None:
    """It covers the bias of the result, its gradient, and copies without empty rows."""
    case = replace(case, dtype=dtype)
    D, E = case.width, len(case.used)
    bias, rows = normal(case, E, D, seed=2), normal(case, case.rows, D)
    out = Guarded((case.rows, D), dtype, case.offset)
    out.tensor.copy_(rows)
    call(case, "add_bias", bias, out.tensor)
    sums = Guarded((E, D), dtype, case.offset)
    workspace = Guarded((most_units(case) * D,), torch.float32)
    for _, _, empty in case.slices():
        rows[empty] = torch.nan
    call(case, "add_rows", rows, sums.tensor, workspace.tensor)
    workspace.check()
    for expert, own, empty in case.slices():
        check(out.check()[own], (rows[own].double() + bias[expert].double()), dtype)
        check(sums.check()[expert], rows[own].double().sum(0), dtype)
        assert not out.tensor[empty].isnan().any()
    if case.stride:
        clean = Guarded((case.rows, D), dtype, case.offset)
        call(case, "clear_empty", rows, clean.tensor)
        for _, own, empty in case.slices():
            assert torch.equal(clean.check()[own], rows[own])
            assert not clean.tensor[empty].any()


@pytest.mark.parametrize("size", [512, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_unused_experts(call: Call, dtype: torch.dtype, size: int) -> None:
    case = Case(used=(0, 3, 0), dtype=dtype)
    weights = normal(case, 3, size)
    wanted = weights.clone()
    wanted[::2] = 0
    call(case, "clear_unused", ctypes.c_int64(size), weights)
    assert torch.equal(weights, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_does_not_matter(call: Call, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    case = Case(used=(130, 3), dropout=0.2, dtype=dtype)
    grad = normal(case, case.rows, case.hidden)
    first = activation(case, call, grad)
    library.emulation_reverse(True)
    try:
        second = activation(case, call, grad)
    finally:
        library.emulation_reverse(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_workspace(library: ctypes.CDLL) -> None:
    for case in CASES:
        assert library.experts_workspace(ctypes.byref(case.shape), ctypes.c_int64(5)) == (
            most_units(case) * 5 * 4
        )


def test_numbers_that_are_none(call: Call) -> None:
    case = Case(used=(3,), hidden=8, width=8)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 40.0, -40.0, 0.0]).repeat(3, 1)
    bias, act = torch.zeros(1, 8), torch.empty(3, 8)
    grad, sums, workspace = torch.ones(3, 8), torch.empty(1, 8), torch.empty(8)
    nothing = (None, ctypes.c_double(0.0))
    call(case, "activation_backward", bias, *nothing, x, act, grad, sums, workspace)
    assert act[0].isnan().tolist() == [True, False, True] + 5 * [False]
    assert act[0, 3:].tolist() == [float(x[0, 3]), 0, 40, 0, 0]
    assert grad[0, 3:].tolist() == pytest.approx([1, 0, 1, 0, 0.5])
    assert not grad[0, :3].isfinite().any()
