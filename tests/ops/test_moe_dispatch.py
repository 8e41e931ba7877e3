"""Dispatch and combine: the reference against a plain loop, the kernels against the reference."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swin_moe import ops
from swin_moe.ops import _library, choice
from tests.ops import devices

needs_library = devices.needs_library("moe_dispatch")
DEVICES = devices.devices("moe_dispatch")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# T, k, S, D: tokens dropped and slots empty, both together, none; odd and unaligned widths.
SHAPES = [
    (37, 1, 50, 64),
    (37, 2, 50, 96),
    (64, 2, 160, 13),
    (20, 1, 20, 100),
    (33, 3, 40, 200),
    (300, 2, 700, 48),
    (5, 2, 8, 1),
    (0, 2, 4, 8),
    (4, 2, 0, 8),
    (0, 1, 0, 8),
]


def make_plan(tokens: int, top_k: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a random plan that drops about a tenth of the assignments that would fit."""
    generator = torch.Generator().manual_seed(seed)
    count = int(0.9 * min(tokens * top_k, slots))
    assignment = torch.randperm(tokens * top_k, generator=generator)[:count]
    slot = torch.randperm(slots, generator=generator)[:count]
    source = torch.full((slots,), -1, dtype=torch.int32)
    destination = torch.full((tokens * top_k,), -1, dtype=torch.int32)
    source[slot] = assignment.int()
    destination[assignment] = slot.int()
    return source, destination.view(tokens, top_k)


def make_inputs(shape: tuple[int, int, int, int], dtype=torch.float32, device="cpu"):
    tokens, top_k, slots, width = shape
    source, destination = make_plan(tokens, top_k, slots)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    y = torch.randn(slots, width, generator=generator).to(dtype)
    gate = torch.rand(tokens, top_k, generator=generator)
    return tuple(tensor.to(device) for tensor in (x, y, gate, source, destination))


def run(dispatch, combine, x, y, gate, source, destination) -> list[Tensor]:
    """Return both outputs and all three gradients, for gradients that vary by element."""
    x, y, gate = (tensor.detach().requires_grad_() for tensor in (x, y, gate))
    slots, out = dispatch(x, source, destination), combine(y, gate, source, destination)
    generator = torch.Generator().manual_seed(2)
    for result in (slots, out):
        weight = torch.randn(result.shape, generator=generator)
        result.backward(weight.to(result))
    return [slots, out, x.grad, y.grad, gate.grad]


def test_reference_equals_a_plain_loop():
    x, y, gate, source, destination = make_inputs((9, 2, 12, 5))
    slots, out = torch.zeros(12, 5), torch.zeros(9, 5)
    for t in range(9):
        for j in range(2):
            if (s := int(destination[t, j])) >= 0:
                assert source[s] == t * 2 + j
                slots[s] = x[t]
                out[t] += gate[t, j] * y[s]
    torch.testing.assert_close(ops.moe_dispatch_reference(x, source, destination), slots)
    torch.testing.assert_close(ops.moe_combine_reference(y, gate, source, destination), out)


@pytest.mark.parametrize("shape", [(7, 2, 10, 3), (6, 1, 4, 5)])
def test_reference_gradcheck(shape):
    x, y, gate, source, destination = make_inputs(shape, torch.float64)
    x, y, gate = (tensor.double().requires_grad_() for tensor in (x, y, gate))
    assert torch.autograd.gradcheck(ops.moe_dispatch_reference, (x, source, destination))
    assert torch.autograd.gradcheck(ops.moe_combine_reference, (y, gate, source, destination))
    assert torch.autograd.gradgradcheck(ops.moe_combine_reference, (y, gate, source, destination))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_forward_and_backward(shape, dtype, device):
    """Without the library, the op's own formula is compared with autograd's."""
    inputs = make_inputs(shape, dtype, device)
    ours = run(ops.moe_dispatch, ops.moe_combine, *inputs)
    reference = run(ops.moe_dispatch_reference, ops.moe_combine_reference, *inputs)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(ours[0], reference[0])  # dispatch only moves


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_accumulate_in_fp32(dtype):
    """Compared with fp64, the only error is the rounding of the result to its dtype."""
    x, y, gate, source, destination = make_inputs((64, 3, 180, 333), dtype)
    half_ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    tolerance = {"rtol": half_ulp, "atol": 1e-6}
    plan = (source, destination)

    out = ops.moe_combine(y, gate, *plan)
    exact = ops.moe_combine_reference(y.double(), gate.double(), *plan)
    torch.testing.assert_close(out.double(), exact, **tolerance)

    grad_x = torch.ops.swin_moe.moe_dispatch_backward(y, destination)
    ones = torch.ones_like(gate, dtype=torch.float64)
    exact = ops.moe_combine_reference(y.double(), ones, *plan)
    torch.testing.assert_close(grad_x.double(), exact, **tolerance)

    _, grad_gate = torch.ops.swin_moe.moe_combine_backward(x, y, gate, *plan)
    rows = ops.moe_dispatch_reference(x.double(), *plan)
    products = (rows * y.double()).sum(1)  # [S]
    exact = torch.zeros(64 * 3, dtype=torch.float64)
    exact[source[source >= 0].long()] = products[source >= 0]
    torch.testing.assert_close(grad_gate.double().flatten(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_expanded_tensors(device):
    x, y, gate, source, destination = make_inputs((16, 2, 24, 32), device=device)
    strided = [t.t().contiguous().t() for t in (x, y, gate)]
    ours = run(
        ops.moe_dispatch, ops.moe_combine, *strided, source, destination.t().contiguous().t()
    )
    expected = run(ops.moe_dispatch, ops.moe_combine, x, y, gate, source, destination)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)

    y = y.bfloat16().requires_grad_()
    ops.moe_combine(y, gate, source, destination).sum().backward()  # an expanded gradient
    rows = torch.zeros(24, device=device)
    kept = destination >= 0
    rows[destination[kept].long()] = gate[kept]
    torch.testing.assert_close(y.grad, rows[:, None].expand(24, 32).bfloat16())


def test_unused_values_never_show():
    """Values that no slot or token refers to must not appear, not even as NaN."""
    x, y, gate, source, destination = make_inputs((16, 2, 40, 24))
    y[source < 0] = float("nan")
    gate[destination < 0] = float("inf")
    for result in run(ops.moe_dispatch, ops.moe_combine, x, y, gate, source, destination):
        assert torch.isfinite(result).all()
    slots = ops.moe_dispatch(x, source, destination)
    assert (slots[source < 0] == 0).all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_for_any_number_of_threads(dtype):
    inputs = make_inputs((2000, 2, 3000, 96), dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run(ops.moe_dispatch, ops.moe_combine, *inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dtypes_without_a_kernel_use_the_reference():
    for dtype in (torch.float64, torch.float16):
        inputs = make_inputs((16, 2, 24, 32), dtype)
        assert not choice.uses_kernel("moe_dispatch", inputs[0])
        ours = run(ops.moe_dispatch, ops.moe_combine, *inputs)
        reference = run(ops.moe_dispatch_reference, ops.moe_combine_reference, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_errors_name_the_wrong_argument():
    x, y, gate, source, destination = make_inputs((8, 2, 12, 4))
    for call, message in [
        (lambda: ops.moe_dispatch(x, source.long(), destination), "int32"),
        (lambda: ops.moe_dispatch(x, source, destination.float()), "int32"),
        (lambda: ops.moe_dispatch(x[:5], source, destination), "x has shape"),
        (lambda: ops.moe_dispatch(x[0], source, destination), "x has shape"),
        (lambda: ops.moe_dispatch(x, source, destination[:, :0]), "destination"),
        (lambda: ops.moe_dispatch(x, destination, destination), "source must be"),
        (lambda: ops.moe_combine(y, gate.half(), source, destination), "gate must be float32"),
        (lambda: ops.moe_combine(y, gate[:3], source, destination), "gate has shape"),
        (lambda: ops.moe_combine(y[:3], gate, source, destination), "y has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@needs_library
def test_the_kernels_check_for_themselves():
    x, y, gate, source, destination = make_inputs((8, 2, 12, 4))
    compiled = torch.ops.swin_moe
    for call, message in [
        (lambda: compiled.moe_dispatch(x, source.long(), destination), "source must be Int"),
        (lambda: compiled.moe_dispatch(x.half(), source, destination), "no kernel for dtype"),
        (lambda: compiled.moe_dispatch(x[:3], source, destination), "x must have size"),
        (lambda: compiled.moe_combine(y, gate.half(), source, destination), "gate must be Float"),
        (lambda: compiled.moe_combine(y, gate[:2], source, destination), "gate must have size"),
        (
            lambda: compiled.moe_combine_backward(x[:, :2], y, gate, source, destination),
            "grad_out must have size",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("bad", [10**6, -5])
def test_index_out_of_range_is_an_error(bad):
    x, y, gate, source, destination = make_inputs((8, 1, 12, 4))
    wrong_source, wrong_destination = source.clone(), destination.clone()
    wrong_source[3], wrong_destination[3, 0] = bad, bad
    with pytest.raises((RuntimeError, IndexError)):
        ops.moe_dispatch(x, wrong_source, destination)
    with pytest.raises((RuntimeError, IndexError)):
        ops.moe_combine(y, gate, source, wrong_destination)
    compiled = torch.ops.swin_moe
    with pytest.raises((RuntimeError, IndexError)):
        compiled.moe_dispatch_backward(y, wrong_destination)
    for maps in ((wrong_source, destination), (source, wrong_destination)):
        with pytest.raises((RuntimeError, IndexError)):
            compiled.moe_combine_backward(x, y, gate, *maps)


@needs_library
@pytest.mark.parametrize("wrong_map", ["source", "destination"])
def test_maps_that_are_not_inverse_are_an_error(wrong_map):
    """Otherwise two threads, or none, would write a gate's gradient."""
    x, y, gate, source, destination = make_inputs((16, 1, 12, 4))
    index = source if wrong_map == "source" else destination.view(-1)
    index[(index < 0).nonzero()[0]] = index[(index >= 0).nonzero()[0]]
    with pytest.raises(RuntimeError, match="not inverse"):
        torch.ops.swin_moe.moe_combine_backward(x, y, gate, source, destination)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(dtype, strided):
    x, y, gate, source, destination = make_inputs((8, 2, 12, 16), dtype)
    if strided:
        x, y, gate, destination = (t.t().contiguous().t() for t in (x, y, gate, destination))
    for tensor in (x, y, gate):
        tensor.requires_grad_()
    compiled = torch.ops.swin_moe
    torch.library.opcheck(compiled.moe_dispatch, (x, source, destination))
    torch.library.opcheck(compiled.moe_combine, (y, gate, source, destination))
    x, y, gate = x.detach(), y.detach(), gate.detach()
    torch.library.opcheck(compiled.moe_dispatch_backward, (y, destination))
    torch.library.opcheck(compiled.moe_combine_backward, (x, y, gate, source, destination))
    expanded = torch.ones((), dtype=dtype).expand(8, 16)
    torch.library.opcheck(compiled.moe_combine_backward, (expanded, y, gate, source, destination))


def test_compiles_as_one_graph():
    def layer(x, gate, source, destination):
        slots = ops.moe_dispatch(x, source, destination)
        return ops.moe_combine(slots * 2, gate, source, destination)

    x, _, gate, source, destination = make_inputs((16, 2, 24, 32))
    x.requires_grad_()
    expected = layer(x, gate, source, destination)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, gate, source, destination)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_status_and_require_fused(monkeypatch):
    assert set(ops.status()) >= {"moe_dispatch", "moe_combine"}
    assert not any(name.endswith("_backward") for name in ops.status())
    with pytest.raises(ValueError, match="no kernels exist for device 'xpu'"):
        ops.require_fused("xpu")
    monkeypatch.setattr(choice, "_required", False)
    monkeypatch.setattr(choice, "compiled_for", lambda op, device: device == "cpu")
    assert set(ops.status().values()) == {"compiled (cpu)"}
    ops.require_fused("cpu")
    with pytest.raises(ValueError, match=r"not compiled for cuda.*pip install"):
        ops.require_fused("cuda")


def test_a_broken_library_is_announced(tmp_path, caplog):
    (tmp_path / "_C.so").write_text("not a library")
    with caplog.at_level(logging.WARNING, "swin_moe"):
        assert not _library.load(tmp_path)
    assert "not loadable" in caplog.text
    assert "pip install" in caplog.text


def test_without_the_library_the_reference_runs_with_a_warning(tmp_path):
    """A process of its own imports a copy of the package that was never built."""
    package = tmp_path / "swin_moe"
    shutil.copytree(
        Path(ops.__file__).parent, package / "ops", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "__init__.py").touch()
    shutil.copytree(
        Path(ops.__file__).parents[1] / "common", package / "common",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    code = """
import torch
from swin_moe import ops
assert set(ops.status().values()) == {"reference"}, ops.status()
source = torch.tensor([1, -1, 0], dtype=torch.int32)
destination = torch.tensor([[2], [0], [-1]], dtype=torch.int32)
x = torch.eye(3, requires_grad=True)
slots = ops.moe_dispatch(x, source, destination)
out = ops.moe_combine(slots, torch.full((3, 1), 2.0), source, destination)
out.sum().backward()
assert out.tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 0]], out
assert x.grad.tolist() == [[2, 2, 2], [2, 2, 2], [0, 0, 0]], x.grad
try:
    ops.require_fused("cpu")
except ValueError as error:
    assert "pip install --no-build-isolation -e ." in str(error)
else:
    raise AssertionError("require_fused accepted references")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "compiled ops" in line]
    assert len(lines) == 1
    assert "not built" in lines[0]
    assert "pip install --no-build-isolation -e ." in lines[0]
