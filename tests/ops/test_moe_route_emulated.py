"""The CUDA kernels of the routing, run on the CPU by ``tests/cuda_emulation``."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swin_moe.ops import Route, RouteOptions, moe_route_reference
from swin_moe.ops.moe_route import MAX_CUDA_EXPERTS
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


@pytest.mark.parametrize("experts", [1, 31, 32, 33])
@pytest.mark.parametrize("tokens", [0, 1, 129])
def test_threads_and_warps(route: Routing, experts: int, tokens: int) -> None:
    """Up to 32 experts, a thread does a token; with more, a warp does."""
    for top_k in range(1, min(experts, 4) + 1):
        sigmoid, odd = top_k > 2, top_k % 2 == 1
        options = RouteOptions(top_k, sigmoid, odd, odd, 1, 5 * top_k, not odd, 0.2 * odd)
        inputs = clear_inputs(tokens, experts, sigmoid, odd, not odd, seed=top_k)
        inputs.logits[1::9] = math.nan
        check(inputs, options, function=route)


# The length of a group, and launches of kernels and fills of memory: fill, scores, plan, places;
# and those of the sort.
@pytest.mark.parametrize(
    ("tokens", "groups", "prioritized", "launches"),
    [
        (1201, 1, False, 4),
        (1201, 1, True, 5),
        (4096, 1, True, 5),
        (4097, 1, True, 7),
        (8990, 2, True, 7),
        (8990, 2, False, 4),
        (61, 61, True, 5),
        (61, 61, False, 4),
    ],
)
def test_tiles(
    route: Routing, library: ctypes.CDLL, tokens: int, groups: int, prioritized: bool, launches: int
) -> None:
    """Some groups have a last tile that is not full."""
    options = RouteOptions(2, False, True, prioritized, groups, load_sigma=0.125)
    for experts, capacity in ((3, 0), (8, tokens // groups // 5 + 1)):
        inputs = clear_inputs(tokens, experts, False, True, False)
        inputs.logits[::7, 1] = math.nan
        library.emulation_launches()
        inputs.route(route, options._replace(capacity=capacity))
        assert library.emulation_launches() == launches
        check(inputs, options._replace(capacity=capacity), function=route)


@pytest.mark.parametrize("prioritized", [False, True])
def test_nothing_to_do(route: Routing, library: ctypes.CDLL, prioritized: bool) -> None:
    """Without tokens, rows or room: no pointer is null where CUDA wants one, no grid is empty."""
    options = RouteOptions(1, prioritized=prioritized)
    for tokens, experts, more, launches in (
        (0, 4, {}, 1),
        (0, 1, {"groups": 3}, 1),
        (0, 4, {"capacity": 2, "padded": True}, 2),
        (6, 4, {"groups": 6, "capacity": 1, "top_k": 4}, 4 + prioritized),
        (6, 1, {"groups": 2, "capacity": 900, "padded": True}, 4 + prioritized),
    ):
        inputs, chosen = Inputs(torch.zeros(tokens, experts)), options._replace(**more)
        library.emulation_launches()
        inputs.route(route, chosen)
        assert library.emulation_launches() == launches
        check(inputs, chosen, function=route)


def test_emulation_finds_launches_of_nothing(library: ctypes.CDLL) -> None:
    assert library.fill_nothing() != 0
    assert library.launch_nothing() != 0


def test_many_experts(route: Routing, library: ctypes.CDLL) -> None:
    """With so many, a block has fewer warps; one more is refused."""
    options = RouteOptions(4, normalize=True, prioritized=True, load_sigma=0.1)
    generator = torch.Generator().manual_seed(0)
    check(Inputs(torch.randn(70, 1024, generator=generator)), options, function=route)
    small = options._replace(sigmoid=True, prioritized=False, capacity=1, groups=5)
    check(Inputs(torch.randn(35, 1023, generator=generator)), small, function=route)
    for experts in (MAX_CUDA_EXPERTS, MAX_CUDA_EXPERTS + 1):
        shape, _ = structures(torch.empty(4, experts), options)
        assert library.moe_route_supported(shape) == (experts == MAX_CUDA_EXPERTS)


@pytest.mark.parametrize("experts", [4, 36])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_extreme_logits(route: Routing, sigmoid: bool, experts: int) -> None:
    """Scores are 0 and 1, denormal, or differ beyond fp32."""
    rows = [[-100, -101, -102, -103], [90, 89, -90, -95], [1e-40, 0, -1e-40, 5]]
    logits = torch.full((4, experts), -200.0)
    logits[:, :4] = torch.tensor([[3e38, -3e38, 0, 1], *rows])
    options = RouteOptions(2, sigmoid, True, True, load_sigma=0.25)
    ours = route(logits, None, None, options)
    exact = moe_route_reference(logits.double(), None, None, options)
    assert torch.equal(ours.expert, exact.expert)
    fine = [0, 2, 3] if sigmoid else [0, 1, 2, 3]  # not with the least sum of scores
    torch.testing.assert_close(ours.gate[fine].double(), exact.gate[fine], rtol=1e-5, atol=1e-6)
    assert bool(gradients(Inputs(logits[1:]), route, options).isfinite().all())


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


def test_least_scores_come_last(route: Routing) -> None:
    """Keys of scores that are 0, denormal and 1 have their order."""
    logits = torch.tensor([[-200.0, -300], [-90, -300], [200, -300], [0, -300], [-200, -300]])
    options = RouteOptions(1, sigmoid=True, prioritized=True)
    assert route(logits, None, None, options).slot.flatten().tolist() == [3, 2, 0, 1, 4]


@pytest.mark.parametrize(("tokens", "experts"), [(1500, 9), (4500, 9), (300, 40)])
def test_order_does_not_matter(
    route: Routing, library: ctypes.CDLL, tokens: int, experts: int
) -> None:
    """The order of blocks, and of threads between barriers, changes no bit."""
    generator = torch.Generator().manual_seed(1)
    inputs = Inputs(*torch.randn(2, tokens, experts, generator=generator))
    inputs.logits = inputs.logits[: tokens // 2].repeat(2, 1)  # many have equal keys
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
