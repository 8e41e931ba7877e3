"""The fallback of window attention, compiled on a CPU here, against the reference."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from swin_moe.ops import attention_fallback, choice
from swin_moe.ops.window_reference import Windows, attention_reference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
SHIFTED = Windows((4, 4), (2, 2))


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(attention_fallback, "compiles_on", lambda device: True)
    monkeypatch.setattr(attention_fallback, "_compiler_failed", False)
    monkeypatch.setattr(attention_fallback, "_ready", set())
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def inputs(
    side: tuple[int, int], heads: int = 3, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(batch, *side, 3, heads, 16, generator=generator).to(dtype)
    bias = torch.randn(heads, 16, 16, generator=generator)
    return [qkv, bias, torch.rand(heads, 1, 1, generator=generator)]


def run(function: Any, tensors: list[Tensor], windows: Windows, *chunk: int) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    seed = torch.tensor([-(2**40) - 5]) if windows.dropout_p else None
    out = function(*leaves, seed, windows, *chunk)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(tensors: list[Tensor], windows: Windows, tolerance: float, *chunk: int) -> None:
    found = run(attention_fallback.attention_fallback, tensors, windows, *chunk)
    assert not attention_fallback._compiler_failed
    exact = run(attention_reference, [tensor.double() for tensor in tensors], windows)
    for mine, wanted in zip(found, exact, strict=True):
        assert (mine.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_one_graph_for_all_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, batch and heads vary, also with padding. The backend is one that compiles no code."""
    graph = torch.compile(attention_fallback._run, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(attention_fallback, "_graph", lambda: graph)
    check(inputs((8, 8)), SHIFTED, 1e-5)
    assert len(attention_fallback._ready) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):  # an error would set the flag
        check(inputs((12, 8), heads=2, batch=4), SHIFTED, 1e-5)
        check(inputs((9, 6), heads=5), SHIFTED, 1e-5)
        check(inputs((12, 12), heads=4), Windows((4, 4), (0, 3)), 1e-5)
    assert len(attention_fallback._ready) == 1


@needs_compiler
def test_dropout_chunks_and_checkpointing() -> None:
    """The mask is the same hash, and a first call inside a checkpoint counts no extra tensors."""
    windows = SHIFTED._replace(dropout_p=0.3)
    tensors = inputs((7, 8), dtype=torch.bfloat16)
    check(tensors, windows, 2e-2, 4)
    check(tensors, windows, 2e-2)

    def recomputed(*arguments: Any) -> Tensor:
        return checkpoint(attention_fallback.attention_fallback, *arguments, use_reentrant=False)

    whole, again = (
        run(function, tensors, windows)
        for function in (attention_fallback.attention_fallback, recomputed)
    )
    assert all(map(torch.equal, whole, again))


def test_a_fault_of_the_compiler_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("no C++ compiler was found\n" + "details " * 50)

    monkeypatch.setattr(attention_fallback, "_graph", broken)
    tensors = inputs((8, 8))
    wanted = run(attention_reference, tensors, SHIFTED)
    for _ in range(2):
        found = run(attention_fallback.attention_fallback, tensors, SHIFTED)
        assert all(map(torch.equal, found, wanted))
    (record,) = caplog.records
    assert record.getMessage() == (
        "window attention is not compiled, the slower reference runs: "
        "RuntimeError: no C++ compiler was found"
    )


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "case", ["plain", "fp64", "fake", "mode", "reference", "exporting", "functorch", "empty"]
)
def test_when_it_compiles(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attend(x: Tensor, *others: Any) -> Tensor:
        calls.append(x)
        return x.new_zeros(*x.shape[:3], 48)

    monkeypatch.setattr(attention_fallback, "_attend", attend)
    call = attention_fallback.attention_fallback
    arguments = (*inputs((8, 8), batch=0 if case == "empty" else 2), None, SHIFTED)
    if case == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            call(*(mode.from_tensor(tensor) for tensor in arguments[:3]), *arguments[3:])
    elif case == "mode":
        with _Watching():
            call(*arguments)
    elif case == "functorch":
        torch.func.vmap(lambda qkv: call(qkv, *arguments[1:]))(arguments[0][None])
    else:
        if case == "reference":
            monkeypatch.setattr(choice, "_wanted", False)
        if case == "exporting":
            monkeypatch.setattr(attention_fallback, "is_leaving", lambda: True)
        if case == "fp64":
            arguments = (arguments[0].double(), *arguments[1:])
        call(*arguments)
    assert len(calls) == (case == "plain")


def test_the_import_stays_light() -> None:
    code = "import sys, swin_moe.ops; assert not {'torch._dynamo', 'sympy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
