"""The CUDA kernels of the routing, run on the CPU by ``tests/cuda_emulation``."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swin_moe.ops import Route, RouteOptions
from tests.ops.emulation import Guarded, build_emulation, pointers
from tests.ops.route_cases import Inputs, check, clear_inputs, gradients, some_options


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "top_k", "groups", "capacity")),
        ("padded", ctypes.c_bool),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_bool) for name in ("sigmoid", "normalize", "prioritized")),
        ("load_sigma", ctypes.c_float),
    ]


Routing = Callable[..., Route]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build_emulation(tmp_path_factory.mktemp("emulation"), "moe_route")
    loaded.moe_route_supported.restype = ctypes.c_bool
    loaded.moe_route_workspace.restype = ctypes.c_int64
    return loaded


def structures(logits: Tensor, options: RouteOptions) -> list[Any]:
    shape = Shape(*logits.shape, options.top_k, options.groups, options.capacity, options.padded)
    numbers = (options.sigmoid, options.normalize, options.prioritized, options.load_sigma)
    return [ctypes.byref(shape), ctypes.byref(Options(*numbers))]


@pytest.fixture
def route(library: ctypes.CDLL) -> Routing:
    """Run the kernels with the interface of ``moe_route``, with gradients."""

    def succeed(error: int) -> None:
        assert error == 0, (error, library.emulation_error().decode())

    class Emulated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
            noise, bias, options = others
            (T, E), k = logits.shape, options.top_k
            small, wide = torch.int32, torch.int64
            out = [
                *(Guarded(size, torch.float32) for size in ((T, k), (3, E), (5,))),
                Guarded((T, k), wide),
                *(Guarded(size, small) for size in ((T, k), (options.rows(T, E),), (T, k))),
                *(Guarded((E,), wide) for _ in range(3)),
            ]
            ctx.common = structures(logits, options)
            size = library.moe_route_workspace(ctx.common[0])
            assert size % 4 == 0
            workspace = Guarded((size // 4,), torch.float32)
            tensors = (logits, noise, bias, *(part.tensor for part in out), workspace.tensor)
            succeed(library.moe_route(*ctx.common, *pointers(*tensors)))
            workspace.check()
            results = tuple(part.check().clone() for part in out)
            ctx.mark_non_differentiable(*results[3:])
            ctx.save_for_backward(logits, noise, results[3])
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            grad = Guarded(tuple(ctx.saved_tensors[0].shape), torch.float32)
            arguments = [part.contiguous() for part in grads[:3]]
            tensors = pointers(*arguments, *ctx.saved_tensors, grad.tensor)
            succeed(library.moe_route_backward(*ctx.common, *tensors))
            return grad.check().clone(), None, None, None

    def run(
        logits: Tensor, noise: Tensor | None, bias: Tensor | None, options: RouteOptions
    ) -> Route:
        tensors = (None if t is None else t.contiguous() for t in (logits, noise, bias))
        gate, sums, scalars, expert, *rest = Emulated.apply(*tensors, options)
        return Route(expert, gate, *rest, sums, scalars)

    return run


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (2, 2), (5, 3), (8, 2), (64, 1), (40, 40)])
def test_parity(route: Routing, experts: int, top_k: int) -> None:
    for tokens, noise, bias, options in some_options(experts, top_k, 8):
        inputs = clear_inputs(tokens, experts, options.sigmoid, noise, bias)
        check(inputs, options, function=route)


def test_several_tiles(route: Routing) -> None:
    """Some groups have a last tile that is not full."""
    options = RouteOptions(2, False, True, True, 1, 700, load_sigma=0.125)
    check(clear_inputs(2500, 8, False, True, False), options, function=route)
    inputs = clear_inputs(2600, 3, True, False, True)
    inputs.logits[::7, 1] = math.nan
    check(inputs, options._replace(groups=2, sigmoid=True, top_k=1), function=route)
    check(inputs, options._replace(groups=2, sigmoid=True, prioritized=False), function=route)


def test_many_experts(route: Routing, library: ctypes.CDLL) -> None:
    """With so many, a block has fewer warps; one more is refused."""
    options = RouteOptions(2, normalize=True, prioritized=True, load_sigma=0.1)
    generator = torch.Generator().manual_seed(0)
    check(Inputs(torch.randn(70, 1024, generator=generator)), options, function=route)
    check(Inputs(torch.randn(9, 1)), options._replace(top_k=1), function=route)
    for experts, supported in ((1024, True), (1025, False)):
        shape, _ = structures(torch.empty(4, experts), options)
        assert library.moe_route_supported(shape) == supported


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_tokens_that_are_not_finite(route: Routing, sigmoid: bool, value: float) -> None:
    for bias in (False, True):
        options = RouteOptions(2, sigmoid, True, True, 2, load_sigma=0.2)
        inputs = clear_inputs(120, 5, sigmoid, True, bias)
        inputs.logits[[0, 33, 64, 119], 3] = value
        check(inputs, options, function=route)
        inputs.logits[:] = value
        check(inputs, options, function=route)


def test_equal_scores_go_by_index(route: Routing) -> None:
    result = route(torch.zeros(9, 4), None, None, RouteOptions(2, prioritized=True))
    assert result.expert.tolist() == [[0, 1]] * 9
    assert result.slot.tolist() == [[t, t] for t in range(9)]
    signed = torch.tensor([[-0.0, 0.0, -0.0]])
    assert route(signed, None, None, RouteOptions(3)).expert.tolist() == [[0, 1, 2]]


def test_order_does_not_matter(route: Routing, library: ctypes.CDLL) -> None:
    """The order of blocks, and of threads between barriers, changes no bit."""
    generator = torch.Generator().manual_seed(1)
    inputs = Inputs(*torch.randn(2, 1500, 9, generator=generator))
    options = RouteOptions(2, normalize=True, prioritized=True, capacity=200, load_sigma=0.1)
    results = []
    for reversed_order in (False, True):
        library.emulation_reverse(reversed_order)
        try:
            grad = gradients(inputs, route, options)
            results.append([*inputs.route(route, options), grad])
        finally:
            library.emulation_reverse(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
