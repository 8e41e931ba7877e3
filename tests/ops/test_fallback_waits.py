"""The fallbacks on a GPU: no wait of the host, and no sum in an order that changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe import ops
from swin_moe.ops import RouteOptions, experts_reference
from tests.ops.test_moe_dispatch import make_inputs as dispatch_inputs
from tests.ops.test_moe_experts import CASES, SEED, Case, Inputs, check, expected, results
from tests.ops.test_moe_experts import make_inputs as expert_inputs

PADDED = [replace(case, dropout=drop) for case in CASES if case.stride for drop in (0.0, 0.3)]
PACKED = [
    replace(case, dropout=drop, dtype=dtype)
    for case in CASES
    if not case.stride and case.width % 8 == case.hidden % 8 == 0 and case.rows
    for drop, dtype in ((0.0, torch.float32), (0.3, torch.bfloat16))
]


def on_a_gpu(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return output and gradients of the form that a GPU would run."""
    tensors = {name: t.detach().requires_grad_() for name, t in inputs.differentiable().items()}
    rows, *weights = ({"fc2_bias": None, **tensors}[name] for name in FIELDS)
    if case.stride:
        out = experts_reference.experts_batched(
            rows, inputs.used, tuple(weights), case.stride, case.dropout, SEED
        )
    else:
        out = experts_reference.experts_grouped(
            rows, inputs.used, tuple(weights), case.dropout, SEED
        )
    out.backward(inputs.grad)
    return results(case, out, tensors)


FIELDS = ("rows", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


@pytest.mark.parametrize("case", PADDED + PACKED, ids=lambda c: f"{c.used}-{c.stride}-{c.dropout}")
def test_all_experts_at_once(case: Case) -> None:
    """Empty rows and their gradients are NaN."""
    inputs = expert_inputs(case)
    found = on_a_gpu(case, inputs)
    check(found, expected(case, inputs), case.dtype)
    for name in found.keys() - {"out", "rows"}:
        assert not found[name][inputs.used == 0].any(), name  # exactly zero


def test_undefined_gradients_of_unused_experts_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouped product leaves rows and weights without work as they are in memory."""
    grouped = torch._grouped_mm

    def careless(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        y = grouped(x, Spoil.apply(weight, offs), offs=offs)
        number = torch.arange(len(y))[:, None]
        return y.masked_fill(number >= offs[-1], torch.nan)

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, offs: Tensor) -> Tensor:
            ctx.save_for_backward(offs)
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            idle = ctx.saved_tensors[0].diff(prepend=torch.zeros(1, dtype=torch.int32)) == 0
            return grad.masked_fill(idle[:, None, None], torch.nan), None

    monkeypatch.setattr(torch, "_grouped_mm", careless)
    case = Case(used=(7, 0, 12, 0), spare=5)
    inputs = expert_inputs(case)
    check(on_a_gpu(case, inputs), expected(case, inputs), case.dtype)


@pytest.mark.parametrize("spoilt", [(-1, 3), (9, 0)])
def test_lengths_beyond_the_rows_are_an_error(spoilt: tuple[int, int]) -> None:
    for stride in (0, 8):
        case = Case(used=(4, 4), stride=stride)
        inputs = expert_inputs(case)
        inputs.used = torch.tensor(spoilt)
        if stride or sum(spoilt) > 8 or min(spoilt) < 0:
            with pytest.raises(RuntimeError):
                on_a_gpu(case, inputs)


def fake(tensors: dict[str, Any], mode: FakeTensorMode, dtype: torch.dtype) -> dict[str, Any]:
    made = {}
    for name, tensor in tensors.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        with mode:
            made[name] = torch.empty(tensor.shape, dtype=kind, device="cuda")
    return made


@pytest.mark.parametrize(
    ("stride", "dtype", "capability", "waits"),
    [
        (16, torch.float32, 8, False),
        (16, torch.bfloat16, 8, False),
        (0, torch.bfloat16, 9, False),
        (0, torch.bfloat16, 10, False),
        (0, torch.bfloat16, 8, True),
        (0, torch.bfloat16, 12, True),
        (0, torch.float32, 9, True),
        (0, torch.float16, 9, True),
    ],
)
def test_the_host_waits_for_no_gpu_where_it_need_not(
    stride: int, dtype: torch.dtype, capability: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data refuse every read by the host."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    real = expert_inputs(Case(used=(7, 0, 12), stride=stride))
    mode = FakeTensorMode()
    tensors = fake({**real.differentiable(), "used": real.used}, mode, dtype)
    with mode, pytest.raises(DataDependentOutputException) if waits else mode:
        ops.moe_experts_reference(**tensors, stride=stride)


@pytest.mark.parametrize("capacity", [0, 8])
def test_routing_and_dispatch_wait_for_no_gpu(capacity: int) -> None:
    options = RouteOptions(top_k=2, normalize=True, prioritized=True, capacity=capacity)
    with FakeTensorMode():
        logits = torch.empty(32, 4, device="cuda")
        route = ops.moe_route_reference(logits, None, None, options)
        rows = torch.empty(32, 8, device="cuda")
        out = ops.moe_dispatch_reference(rows, route.source, route.destination)
        ops.moe_combine_reference(out, route.gate, route.source, route.destination)
        ops.moe_choose(logits, logits.isfinite().all(1), 1, 4)


class OneWriter(TorchDispatchMode):
    """Refuses ops that add floats in an order of the GPU's choice.

    A scatter along a row is allowed if no place has two writers.
    """

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        if name.startswith(("scatter", "index_add", "index_put", "index_reduce", "embedding")):
            target, *others = arguments
            if target.is_floating_point():
                assert name in ("scatter_add", "scatter"), name
                dim, index = others[:2]
                ordered = index.sort(dim).values
                assert (ordered.diff(dim=dim) != 0).all(), name
        return function(*arguments, **(options or {}))


def dispatch_and_combine() -> list[Tensor]:
    x, y, gate, *maps = dispatch_inputs((33, 3, 60, 8))
    x, y, gate = (tensor.requires_grad_() for tensor in (x, y, gate))
    out = ops.moe_dispatch_reference(x, *maps).square().sum()
    out = out + ops.moe_combine_reference(y, gate, *maps).square().sum()
    first = torch.autograd.grad(out, [x, y, gate], create_graph=True)
    return [*torch.autograd.grad(sum(t.square().sum() for t in first), [x, y, gate])]


def route() -> list[Tensor]:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = RouteOptions(top_k=3, normalize=True, capacity=5, load_sigma=0.2)
    found = ops.moe_route_reference(logits, None, None, options)
    loss = found.gate.square().sum() + found.sums.square().sum() + found.scalars[0]
    return [*torch.autograd.grad(loss, logits)]


def experts(stride: int) -> list[Tensor]:
    case = Case(used=(9, 0, 12), stride=stride)
    return [*on_a_gpu(case, expert_inputs(case)).values()]


def one_by_one() -> list[Tensor]:
    inputs = expert_inputs(Case())
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.differentiable().items()}
    out = ops.moe_experts_reference(used=inputs.used, **tensors)
    return [*torch.autograd.grad(out.sum(), [*tensors.values()])]


def bias() -> list[Tensor]:
    pytest.importorskip("pydantic")  # a GPU machine may lack it
    from swin_moe.models.position import spread_bias_table

    table = torch.randn(49, 3).requires_grad_()
    return [*torch.autograd.grad(spread_bias_table(table, 4).square().sum(), table)]


@pytest.mark.parametrize(
    "work",
    [dispatch_and_combine, route, lambda: experts(0), lambda: experts(16), one_by_one, bias],
    ids=["dispatch", "route", "packed", "padded", "one by one", "bias"],
)
def test_no_place_has_two_writers(work: Callable[[], list[Tensor]]) -> None:
    with OneWriter():
        assert all(tensor is not None for tensor in work())


def test_derivatives_of_the_experts_are_one_copy_each() -> None:
    """An index per expert would make a gradient of full size for each."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(function._schema.name)
            return function(*arguments, **(options or {}))

    case = Case(used=(5,) * 8)
    inputs = expert_inputs(case)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.differentiable().items()}
    out = ops.moe_experts_reference(used=inputs.used, **tensors)
    with Watch():
        out.backward(inputs.grad)
    assert not {"aten::select_backward", "aten::slice_backward"} & {*seen}
    assert seen.count("aten::mm") == 4 * 8
