"""The AMX kernels of the window attention, on processors without AMX.

``tests/cpu_emulation`` emulates the tile instructions, and ends the process where the processor
would fault.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swin_moe.ops.window_reference import attention_reference
from tests.ops.test_cuda_emulated import Guarded, Options, Shape, pointers
from tests.ops.test_window_attention import RESULTS, Case, error, floor

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cpu_emulation"
KERNELS = ROOT / "swin_moe" / "csrc" / "cpu"
FP32, BF16 = 0, 2  # as the kernels number them
SEED = torch.tensor([-(2**40) - 12345])


def why_not() -> str:
    """Return why nothing can be tested here; the processor must have the vector instructions."""
    if shutil.which("g++") is None:
        return "no g++"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "" if "avx512_bf16" in flags.split() else "the processor lacks AVX512-BF16"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulation") / "window_attention.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-I", str(EMULATION)]
    flags += ["-Wall", "-Wno-maybe-uninitialized", "-DSWIN_MOE_AMX_EMULATION"]
    sources = [*EMULATION.glob("*.cpp"), KERNELS / "window_attention.cpp", KERNELS / "isa_amx.cpp"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(path)], check=True)
    return path


@pytest.fixture
def library(library_path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_path))
    loaded.window_groups.restype = ctypes.c_int64
    return loaded


def spans(units: int, threads: int) -> list[tuple[ctypes.c_int64, ctypes.c_int64]]:
    cuts = [units * i // threads for i in range(threads + 1)]
    return [(ctypes.c_int64(a), ctypes.c_int64(b)) for a, b in itertools.pairwise(cuts)]


def emulated(
    library: ctypes.CDLL, case: Case, inputs: list[Tensor], weight: Tensor, threads: int = 2
) -> list[Tensor]:
    """Return output and gradients; the kernel takes heads in pairs, so the last may be alone."""
    qkv, bias, scale = inputs
    H, W = case.size
    shape = Shape(case.batch, H, W, case.heads, case.head_dim, *case.window, *case.shift)
    common = [ctypes.byref(shape), ctypes.byref(Options(case.cosine, case.dropout))]
    groups, rest = library.window_groups(ctypes.byref(shape)), bias.shape[1:]
    windows = case.batch * math.prod(case.windows.grid(H, W))
    seed = SEED if case.dropout else None
    out = Guarded(tuple(weight.shape), torch.bfloat16)
    lse = Guarded((windows, case.heads, case.tokens), torch.float32)
    together = ctypes.c_int64(2)
    head_groups = -(-case.heads // 2)
    arguments = pointers(qkv, bias, scale, seed)
    for span in spans(head_groups * windows, threads):
        library.window_attention(
            *common, *arguments, together, *span, *pointers(out.tensor, lse.tensor)
        )
    grads = [
        Guarded(tuple(qkv.shape), torch.bfloat16),
        Guarded((case.heads, groups, *rest), torch.float32),
        Guarded((case.heads, groups), torch.float32),
    ]
    results = pointers(out.check(), lse.check(), *(grad.tensor for grad in grads))
    for span in spans(head_groups * groups, threads):
        library.window_attention_backward(
            *common, *pointers(weight), *arguments, together, *span, *results
        )
    grad_qkv, grad_bias, grad_scale = (grad.check() for grad in grads)
    return [out.tensor, grad_qkv, grad_bias.sum(1), grad_scale.sum(1).view_as(scale)]


def gradient_of(case: Case) -> Tensor:
    shape = (case.batch, *case.size, case.heads * case.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()


def expected(case: Case, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Return the same by the reference and autograd, in fp64."""
    inputs = [x.double().requires_grad_() for x in inputs]
    out = attention_reference(*inputs, SEED, case.windows)
    out.backward(weight.double())
    return [out.detach(), *(x.grad for x in inputs)]


WINDOWS = [
    ((4, 4), (8, 12), (7, 10)),
    ((7, 7), (14, 7), (9, 15)),
    ((8, 8), (8, 16), (13, 8)),
    ((12, 12), (12, 24), (11, 13)),
    ((16, 16), (16, 16), (17, 15)),
    ((4, 6), (8, 12), (9, 11)),
    ((24, 24), (24, 24), (25, 20)),
]
CASES = [
    Case(window, shift, size, batch, 3, head_dim, cosine=cosine)
    for window, *sizes in WINDOWS
    for head_dim in (16, 32, 48, 64)
    for cosine in (True, False)
    for shift in ((0, 0), (window[0] // 2, window[1] // 2))
    # A map that is whole windows for every other one, and the other for the rest.
    for size in [sizes[(head_dim // 16 + cosine + (shift != (0, 0))) % 2]]
    for batch in [2 if window[0] < 12 else 1]
]
OPTIONS = [
    Case((2, 2), (1, 1), (6, 5)),
    Case((1, 8), (0, 4), (5, 20), 2, 3, 64),
    Case((5, 5), (2, 2), (10, 12), 1, 3, 48),
    Case((6, 6), (3, 3), (12, 10), 1, 2, 64, cosine=False),  # 36 rows: 48 of three strips
    Case((4, 4), (2, 2), (44, 40), 2, 5, 16),  # many groups of windows
    *(
        Case(window, (window[0] // 2, window[1] // 2), (13, 15), 1, 3, dim, scale, cosine, dropout)
        for window, dim in (((7, 7), 32), ((8, 8), 64), ((12, 12), 16), ((4, 6), 48))
        for scale, cosine, dropout in (
            (2.3, True, 0.3),
            (2.3, False, 0.2),
            (4.6, True, 0.0),
            (4.65, True, 0.0),  # one of three heads is clamped
            (9.0, True, 0.0),
        )
    ),
]


@pytest.mark.parametrize("case", [*CASES, *OPTIONS], ids=str)
def test_parity(library: ctypes.CDLL, case: Case) -> None:
    inputs, weight = case.inputs(torch.bfloat16), gradient_of(case)
    mine, exact = emulated(library, case, inputs, weight), expected(case, inputs, weight)
    for name, got, wanted in zip(RESULTS, mine, exact, strict=True):
        limit = floor(name, torch.bfloat16, case)
        assert error(got, wanted) <= limit, f"{name}: {error(got, wanted):.1e} > {limit:.1e}"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_threads_change_nothing(library: ctypes.CDLL, dropout: float) -> None:
    """The scratch memory of the threads is filled with garbage before every call."""
    case = Case((7, 7), (3, 3), (28, 21), 2, 3, 32, dropout=dropout)
    inputs, weight = case.inputs(torch.bfloat16), gradient_of(case)
    first = emulated(library, case, inputs, weight, threads=1)
    for threads in (2, 5):
        other = emulated(library, case, inputs, weight, threads)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "scale", "grad"])
@pytest.mark.parametrize("window", [(4, 4), (6, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_numbers_that_are_none(
    library: ctypes.CDLL, cosine: bool, window: tuple[int, int], where: str, value: float
) -> None:
    """NaN appears where the reference has it; every bit of other heads stays.

    The head's own bias and scale are compared less strictly, as in all kernels, which do not
    compute the reference's contribution of padding.
    """
    shift = (window[0] // 2, window[1] // 2)
    case = Case(window, shift, (13, 14), 1, 2, cosine=cosine)
    inputs, weight = case.inputs(torch.bfloat16), gradient_of(case)
    clean = emulated(library, case, inputs, weight)
    if where in "qkv":
        inputs[0][0, 2, 3, "qkv".index(where), 1, 5] = value
    elif where == "bias":
        inputs[1][1, 2, 3] = value
    elif where == "scale":
        inputs[2][1] = value
    else:
        weight[0, 2, 3, 40] = value
    mine, exact = emulated(library, case, inputs, weight), expected(case, inputs, weight)
    for got, wanted in zip(mine[:2], exact[:2], strict=True):
        finite = wanted.isfinite()
        assert torch.equal(got.isfinite(), finite)
        if bool(finite.any()):
            assert error(got[finite], wanted[finite]) <= 2 * floor("out", torch.bfloat16, case)
    for got, before in zip(mine[2:], clean[2:], strict=True):
        assert torch.equal(got[0], before[0])


def test_zero_rows(library: ctypes.CDLL) -> None:
    case = Case((4, 4), (2, 2), (6, 8), 1, 2)
    inputs, weight = case.inputs(torch.bfloat16), gradient_of(case)
    inputs[0][0, 0, 0] = 0
    mine, exact = emulated(library, case, inputs, weight), expected(case, inputs, weight)
    rest = torch.ones(case.size, dtype=torch.bool)
    rest[0, 0] = False  # its gradient is that of its unit row times 1e12
    assert error(mine[0], exact[0]) <= floor("out", torch.bfloat16, case)
    assert error(mine[1][0, rest], exact[1][0, rest]) <= floor("grad_qkv", torch.bfloat16, case)


def process(library_path: Path, code: str, isa: str | None = None) -> subprocess.CompletedProcess:
    """Run code in a new process, with the library as L."""
    code = f"import ctypes; L = ctypes.CDLL({str(library_path)!r})\n{code}"
    environment = {k: v for k, v in os.environ.items() if k != "SWIN_MOE_ISA"}
    if isa is not None:
        environment["SWIN_MOE_ISA"] = isa
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("isa", "chosen"),
    [
        (None, ["avx512", "avx512_bf16"]),  # not by default: they have not run on the hardware
        ("amx_bf16", ["avx512", "amx_bf16"]),
        ("avx512_bf16", ["avx512", "avx512_bf16"]),
        ("avx2", ["avx2", "avx2"]),
        ("amx", ["", ""]),
    ],
)
def test_who_asks_gets_them(library_path: Path, isa: str | None, chosen: list[str]) -> None:
    code = "L.chosen_kernels.restype = ctypes.c_char_p\n"
    code += f"print([L.chosen_kernels(t).decode() for t in ({FP32}, {BF16})])"
    assert process(library_path, code, isa).stdout.strip() == str(chosen)


FAULTS = [
    "",
    "more than 16 rows",
    "longer than 64 bytes",
    "not the rows of its left side",
    "not the columns of its right side",
    "the sides of a product do not fit",
    "rows or columns, but not both",
    "without a configuration",
    "a tile is used that is not configured",
    "stored over one another",
    "loaded over another",
    "not released",
]


@pytest.mark.parametrize("index", range(len(FAULTS)))
def test_emulation_finds_faults(library_path: Path, index: int) -> None:
    found = process(library_path, f"L.run_faulty({index})")
    assert (found.returncode == 0) == (index == 0)
    assert FAULTS[index] in found.stderr


@pytest.mark.parametrize(("rows", "words", "columns"), [(16, 16, 16), (16, 8, 16), (3, 5, 7)])
def test_emulated_product(library: ctypes.CDLL, rows: int, words: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, 2 * words, generator=generator).bfloat16()
    b = torch.randn(2 * words, columns, generator=generator).bfloat16()
    c = torch.randn(rows, columns, generator=generator)
    a[0, 0] = c[0, 1] = 1e-39  # treated as zero
    b[0, 0] = 1e30
    a[0, 1:] = 0
    row_bytes = [4 * columns, 4 * words, 4 * columns]
    configuration = bytearray(64)
    configuration[0] = 1
    for tile, (count, length) in enumerate(zip((rows, rows, words), row_bytes, strict=True)):
        configuration[48 + tile], configuration[16 + 2 * tile] = count, length
    exact = c.double() + a.double() @ b.double()
    exact[0] = c[0].double()
    exact[0, 1] = 0
    pairs = b.view(words, 2, columns).transpose(1, 2).contiguous()
    library.tile_product(bytes(configuration), *pointers(a, pairs, c))
    torch.testing.assert_close(c.double(), exact, rtol=1e-6, atol=1e-5)
    assert c[0, 1] == 0
