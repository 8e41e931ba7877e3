"""The CUDA kernels of dispatch and combine, run on the CPU by ``tests/cuda_emulation``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from swin_moe.ops import RouteOptions, moe_route_reference
from tests.ops.emulation import Guarded, build_emulation, pointers
from tests.ops.test_cuda_emulated import DTYPES, moved

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("tokens", "top_k", "slots", "width")]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_emulation(tmp_path_factory.mktemp("emulation"), "moe_dispatch")


def call(library: ctypes.CDLL, name: str, dtype: torch.dtype, shape: Shape, *tensors) -> None:
    common = (DTYPES.index(dtype), ctypes.byref(shape))
    error = getattr(library, name)(*common, *pointers(*tensors))
    assert error == 0, (error, library.emulation_error().decode())


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=4 * tolerance)


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Return rows of a table, zeros where the index is −1."""
    padded = torch.cat((table, table.new_zeros(1, table.shape[1])))
    return padded[index.long()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "capacity", "padded"),
    [
        (0, 1, 0, False),
        (0, 2, 3, True),  # rows that are all empty
        (1, 1, 0, False),
        (37, 2, 0, False),
        (37, 3, 4, False),
        (40, 2, 30, True),
    ],
)
@pytest.mark.parametrize(("width", "offset"), [(48, 0), (33, 0), (48, 1)])
def test_parity(
    library: ctypes.CDLL, dtype: torch.dtype, tokens: int, top_k: int, capacity: int, padded: bool,
    width: int, offset: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return moved(torch.randn(size, generator=generator).to(dtype), offset)

    options = RouteOptions(top_k, capacity=capacity, padded=padded)
    logits = torch.randn(tokens, 5, generator=generator)
    route = moe_route_reference(logits, None, None, options)
    source, destination, gate = route.source, route.destination, route.gate
    shape = Shape(tokens, top_k, len(source), width)
    x, y, grad = normal(tokens, width), normal(len(source), width), normal(tokens, width)

    token = torch.where(source >= 0, source // top_k, -1)
    rows = Guarded((len(source), width), dtype, offset)
    call(library, "moe_dispatch", dtype, shape, x, source, rows.tensor)
    assert torch.equal(rows.check(), rows_of(x, token))

    chosen = rows_of(y.double(), destination.flatten()).view(tokens, top_k, width)
    for weight in (gate, None):
        out = Guarded((tokens, width), dtype, offset)
        call(library, "moe_combine", dtype, shape, y, weight, destination, out.tensor)
        factor = torch.ones(tokens, top_k) if weight is None else weight
        close(out.check(), (chosen * factor.double()[:, :, None]).sum(1), dtype)

    grad_y = Guarded((len(source), width), dtype, offset)
    grad_gate = Guarded((tokens, top_k), torch.float32)
    call(
        library, "moe_combine_backward", dtype, shape,
        grad, y, gate, source, destination, grad_y.tensor, grad_gate.tensor,
    )  # fmt: skip
    weights = rows_of(gate.view(-1, 1).double(), source)
    close(grad_y.check(), rows_of(grad.double(), token) * weights, dtype)
    wanted = (chosen * grad.double()[:, None]).sum(2)
    torch.testing.assert_close(grad_gate.check().double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_rows_at_all(library: ctypes.CDLL) -> None:
    """All assignments are dropped: gates still get a gradient of zero."""
    nowhere = torch.full((3, 2), -1, dtype=torch.int32)
    shape, nothing = Shape(3, 2, 0, 8), torch.empty(0, 8)
    grad_gate, out = Guarded((3, 2), torch.float32), Guarded((3, 8), torch.float32)
    gate, grad, source = torch.ones(3, 2), torch.ones(3, 8), torch.empty(0, dtype=torch.int32)
    call(
        library, "moe_combine_backward", torch.float32, shape,
        grad, nothing, gate, source, nowhere, nothing, grad_gate.tensor,
    )  # fmt: skip
    assert not grad_gate.check().any()
    call(library, "moe_combine", torch.float32, shape, nothing, gate, nowhere, out.tensor)
    assert not out.check().any()
    call(library, "moe_dispatch", torch.float32, shape, grad, source, nothing)
