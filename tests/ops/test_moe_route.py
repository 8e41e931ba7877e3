"""Routing: the reference against plain loops, the kernels against the reference in fp64."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from swin_moe import ops
from swin_moe.ops import Route, RouteOptions, choice, moe_route, moe_route_reference
from swin_moe.ops.route_reference import backward_reference
from tests.ops import devices
from tests.ops.route_cases import (
    FLOATS,
    INTEGERS,
    SIZES,
    Inputs,
    check,
    clear_inputs,
    gradients,
    some_options,
)

needs_library = devices.needs_library("moe_route")
DEVICES = devices.devices("moe_route")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_parity(experts: int, top_k: int, device: str) -> None:
    """Without the library, precisions are compared."""
    for tokens, noise, bias, options in some_options(experts, top_k, 24):
        inputs = clear_inputs(tokens, experts, options.sigmoid, noise, bias)
        check(inputs, options, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_many_tokens(sigmoid: bool, device: str) -> None:
    """There are several chunks of sums and passes of the sort."""
    options = RouteOptions(2, sigmoid, True, True, 1, 700, load_sigma=0.125)
    check(clear_inputs(5003, 8, sigmoid, True, False), options, device)
    check(clear_inputs(5004, 8, sigmoid, False, True), options._replace(groups=3), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("experts", [7, 100])
def test_continuous_numbers(experts: int, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for size, top_k, sigmoid in itertools.product((0.1, 3.0, 30.0), (1, 2), (False, True)):
        size = min(size, 3.0) if sigmoid else size  # fp32 sigmoids above 17 are all 1
        logits = size * torch.randn(333, experts, generator=generator)
        noise = torch.randn(333, experts, generator=generator) / experts
        for options in (
            RouteOptions(top_k, sigmoid, False, False, load_sigma=1.0 / experts),
            RouteOptions(top_k, sigmoid, True, False, load_sigma=0.5),
        ):
            check(Inputs(logits, noise), options, device)


def expected_queues(route: Route, options: RouteOptions, priority: Tensor) -> None:
    """Return every integer of a route from its choices, by plain loops."""
    T, k = route.expert.shape
    E = len(route.counts)
    size = T // options.groups
    every = itertools.product(range(E), range(options.groups))
    queues: dict[tuple[int, int], list[int]] = {queue: [] for queue in every}
    for g in range(options.groups):
        tokens = [t for t in range(g * size, (g + 1) * size) if bool(priority[t].isfinite())]
        if options.prioritized:
            tokens.sort(key=lambda t: -float(priority[t]))  # stable
        for j in range(k):
            for t in tokens:
                queues[int(route.expert[t, j]), g].append(t * k + j)
    slot, row = torch.full((T * k,), -1), torch.full((T * k,), -1)
    source: list[int] = []
    for e in range(E):
        if options.padded:
            filler = e * options.groups * options.capacity - len(source)
            source += [-1] * filler
        start = len(source)
        for g in range(options.groups):
            queue = queues[e, g]
            slot[queue] = torch.arange(len(queue))
            source += queue[: options.capacity or None]
        assert len(source) - start == route.used[e]
        assert sum(len(queues[e, g]) for g in range(options.groups)) == route.counts[e]
    source += [-1] * (len(route.source) - len(source))
    for r, a in enumerate(source):
        if a >= 0:
            row[a] = r
    assert route.source.tolist() == source
    assert torch.equal(route.slot.flatten().long(), slot)
    assert torch.equal(route.destination.flatten().long(), row)


@pytest.mark.parametrize("function", [moe_route, moe_route_reference])
def test_queues_equal_plain_loops(function: Callable[..., Route]) -> None:
    for tokens, noise, bias, options in some_options(5, 2, 60):
        tokens = min(tokens, 36)
        inputs = clear_inputs(tokens, 5, options.sigmoid, noise, bias, seed=tokens)
        if tokens > 3:
            inputs.logits[3, 1] = math.nan
        finite = inputs.logits.isfinite().all(1)
        noisy = inputs.logits if inputs.noise is None else inputs.logits + inputs.noise
        scores = noisy.sigmoid() if options.sigmoid else noisy.softmax(1)
        priority = scores.amax(1).masked_fill(~finite, math.nan)
        route = inputs.route(function, options)
        expected_queues(route, options, priority)
        first = torch.bincount(route.expert[finite, 0], minlength=5)
        assert torch.equal(route.first, first)


@pytest.mark.parametrize("device", DEVICES)
def test_row_maps_invert_one_another(device: str) -> None:
    logits = torch.randn(400, 6, device=device)
    for capacity, padded in ((0, False), (20, False), (20, True), (200, True)):
        options = RouteOptions(2, prioritized=True, groups=4, capacity=capacity, padded=padded)
        route = moe_route(logits, None, None, options)
        filled = (route.source >= 0).nonzero()[:, 0]
        assert torch.equal(route.destination.flatten()[route.source[filled].long()], filled.int())
        assert len(filled) == int((route.destination >= 0).sum()) == int(route.used.sum())


@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_go_by_index(device: str) -> None:
    route = moe_route(
        torch.zeros(9, 4, device=device), None, None, RouteOptions(2, prioritized=True)
    )
    assert route.expert.tolist() == [[0, 1]] * 9
    assert route.slot.tolist() == [[t, t] for t in range(9)]
    signed = torch.tensor([[-0.0, 0.0, -0.0]], device=device)
    assert moe_route(signed, None, None, RouteOptions(3)).expert.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_extreme_logits(sigmoid: bool, device: str) -> None:
    """Scores are 0 and 1, denormal, or differ beyond fp32."""
    rows = [
        [3e38, -3e38, 0, 1], [-100, -101, -102, -103], [90, 89, -90, -95], [1e-40, 0, -1e-40, 5],
    ]  # fmt: skip
    logits = torch.tensor(rows, device=device)
    options = RouteOptions(2, sigmoid, True, True, load_sigma=0.25)
    for chosen in (logits, logits[1:]):
        route = moe_route(chosen, None, None, options)
        exact = moe_route_reference(chosen.double(), None, None, options)
        assert torch.equal(route.expert, exact.expert)
        if sigmoid:  # the least sum of scores, which gates are divided by, depends on the dtype
            route, exact = (r._replace(gate=r.gate[[0, -2, -1]]) for r in (route, exact))
        torch.testing.assert_close(route.gate.double(), exact.gate, rtol=1e-5, atol=1e-6)
        assert bool(gradients(Inputs(chosen), moe_route, options)[1:].isfinite().all())
        assert torch.equal(route.slot, exact.slot) or sigmoid


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_only_tokens_that_are_not_finite_are_lost(sigmoid: bool, value: float, device: str) -> None:
    for bias in (False, True):
        options = RouteOptions(2, sigmoid, True, True, groups=2, load_sigma=0.2)
        inputs = clear_inputs(120, 5, sigmoid, True, bias)
        bad = torch.zeros(120, dtype=torch.bool)
        bad[[0, 33, 64, 119]] = True
        inputs.logits[bad, 3] = value
        check(inputs, options, device)
        route = inputs.to(device).route(moe_route, options)
        assert int(route.scalars[4]) == 4
        assert bool((route.slot[bad] == -1).all() and (route.destination[bad] == -1).all())
        assert bool((route.gate[bad] == 0).all() and (route.gate[~bad] > 0).all())
        # The others queue as if these were absent, in groups of the same size.
        gone = bad.to(device)
        rest = Inputs(inputs.logits[~bad], inputs.noise[~bad], inputs.bias).to(device)
        alone = rest.route(moe_route, options)
        for name in ("expert", "gate", "slot"):
            assert torch.equal(getattr(route, name)[~gone], getattr(alone, name)), name
        assert not gradients(inputs.to(device), moe_route, options)[gone].any()


@pytest.mark.parametrize("device", DEVICES)
def test_no_finite_token_at_all(device: str) -> None:
    logits = torch.full((6, 3), math.nan, device=device)
    route = moe_route(logits, None, None, RouteOptions(2, prioritized=True, load_sigma=0.1))
    assert route.scalars.tolist() == [0, 0, math.inf, -math.inf, 6]
    assert not route.sums.any()
    assert not route.counts.any()
    assert bool((route.source == -1).all())


@pytest.mark.parametrize(
    "options",
    [
        RouteOptions(1, load_sigma=0.3),
        RouteOptions(2, normalize=True, load_sigma=0.3, groups=3, capacity=1),
        RouteOptions(3, sigmoid=True, normalize=True),
        RouteOptions(2, sigmoid=True, load_sigma=0.4, prioritized=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("noise", [False, True])
def test_reference_gradcheck(options: RouteOptions, noise: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    more = torch.randn(6, 4, generator=generator, dtype=torch.float64) if noise else None

    def function(leaf: Tensor) -> tuple[Tensor, ...]:
        route = moe_route_reference(leaf, more, None, options)
        return route.gate, route.sums, route.scalars[0]

    assert torch.autograd.gradcheck(function, (logits.requires_grad_(),))
    assert torch.autograd.gradgradcheck(function, (logits,))


def test_gate_of_one_choice_learns_as_its_logarithm() -> None:
    logits = torch.randn(8, 4)
    leaf = logits.clone().requires_grad_()
    moe_route(leaf, None, None, RouteOptions(1, normalize=True)).gate.sum().backward()
    expected = logits.clone().requires_grad_()
    expected.log_softmax(1).amax(1).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("missing", [("gate",), ("sums",), ("scalars",), ("gate", "sums")])
def test_gradients_that_are_not_needed(missing: tuple[str, ...]) -> None:
    options = RouteOptions(2, sigmoid=True, normalize=True, load_sigma=0.3)
    results = []
    for function, dtype in ((moe_route, torch.float32), (moe_route_reference, torch.float64)):
        logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
        route = function(logits.requires_grad_(), None, None, options)
        wanted = [route.gate[:, 0], route.sums[1:], route.scalars[:1]]
        parts = dict(zip(FLOATS, wanted, strict=True))
        loss = sum(part.square().sum() for name, part in parts.items() if name not in missing)
        results.append(torch.autograd.grad(loss, logits)[0].double())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_results_without_a_gradient() -> None:
    logits = torch.randn(8, 4, requires_grad=True)
    route = moe_route(logits, None, None, RouteOptions(2))
    assert all(getattr(route, name).requires_grad for name in FLOATS)
    assert not any(getattr(route, name).requires_grad for name in INTEGERS)
    for index in range(1, 5):
        (grad,) = torch.autograd.grad(route.scalars[index], logits, retain_graph=True)
        assert not grad.any()


@needs_library
def test_no_second_derivative() -> None:
    logits = torch.randn(8, 4, requires_grad=True)
    gate = moe_route(logits, None, None, RouteOptions(2)).gate
    (grad,) = torch.autograd.grad(gate.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@needs_library
def test_deterministic_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = Inputs(*torch.randn(2, 3000, 9, generator=generator))
    options = RouteOptions(2, normalize=True, prioritized=True, capacity=300, load_sigma=0.1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, groups in ((1, 1), (2, 1), (4, 1), (1, 10), (2, 10)):
            torch.set_num_threads(count)
            chosen = options._replace(groups=groups)
            grad = gradients(inputs, moe_route, chosen)
            results.append((groups, [*inputs.route(moe_route, chosen), grad]))
    finally:
        torch.set_num_threads(threads)
    for (groups, one), (others, other) in itertools.pairwise(results):
        if groups == others:
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device: str) -> None:
    inputs = clear_inputs(50, 6, False, True, True).to(device)
    strided = Inputs(
        inputs.logits.t().contiguous().t(),
        inputs.noise.repeat(1, 2)[:, :6],
        inputs.bias.repeat_interleave(2)[::2],
    )
    options = RouteOptions(2, normalize=True, prioritized=True, load_sigma=0.1)
    ours, expected = strided.route(moe_route, options), inputs.route(moe_route, options)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    grads = (gradients(i, moe_route, options) for i in (strided, inputs))
    assert torch.equal(*grads)


def test_more_experts_than_the_cuda_kernels_have_use_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["swin_moe.ops.moe_route"]
    calls: list[int] = []

    def counted(logits: Tensor, *others: Any) -> Route:
        calls.append(logits.shape[1])
        return moe_route_reference(logits, *others)

    monkeypatch.setattr(module, "moe_route_reference", counted)
    with FakeTensorMode(), choice.assume_fused(True):
        for device, experts in (("cuda", 1024), ("cuda", 1025), ("cpu", 1025)):
            logits = torch.empty(4, experts, device=device)
            route = moe_route(logits, None, None, RouteOptions(2))
            assert route.source.shape == (8,)
    assert calls == [1025]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_use_the_reference(dtype: torch.dtype) -> None:
    logits = torch.randn(16, 4).to(dtype)
    route = moe_route(logits, None, None, RouteOptions(2))
    expected = moe_route_reference(logits, None, None, RouteOptions(2))
    assert route.gate.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(route, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 5}, "top_k=5"),
        ({"capacity": -1}, "capacity=-1"),
        ({"groups": 3}, "3 equal groups"),
        ({"groups": 0}, "0 equal groups"),
        ({"padded": True}, "padded rows need a capacity"),
    ],
)
def test_errors_name_the_wrong_option(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_route(torch.zeros(8, 4), None, None, RouteOptions()._replace(**change))


def test_errors_name_the_wrong_tensor() -> None:
    logits = torch.zeros(8, 4)
    for inputs, message in [
        (Inputs(logits[0]), "logits must be"),
        (Inputs(logits, logits[:3]), "noise has shape"),
        (Inputs(logits, None, logits), "bias has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            inputs.route(moe_route, RouteOptions())


@needs_library
def test_the_kernels_check_for_themselves() -> None:
    logits, options = torch.zeros(8, 4), RouteOptions()
    route, backward = torch.ops.swin_moe.moe_route, torch.ops.swin_moe.moe_route_backward
    expert = torch.zeros(8, 1, dtype=torch.int64)
    grads = (torch.zeros(8, 1), None, None)
    for call, message in [
        (lambda: route(logits.half(), None, None, *options), "logits must be Float"),
        (lambda: route(logits, logits[:2], None, *options), "noise must have size"),
        (lambda: route(logits, None, logits, *options), "bias must have 1 dim"),
        (lambda: route(logits, None, None, *options._replace(top_k=5)), "top_k must be"),
        (lambda: route(logits, None, None, *options._replace(groups=3)), "groups must divide"),
        (lambda: backward(*grads, logits, None, expert.int(), *options), "expert must be Long"),
        (lambda: backward(*grads, logits, None, expert + 4, *options), "out of range"),
        (lambda: backward(*grads, logits, None, expert - 1, *options), "out of range"),
        (lambda: backward(logits, None, None, logits, None, expert, *options), "grad_gate must"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool) -> None:
    inputs = clear_inputs(24, 5, False, full, full)
    options = RouteOptions(2, False, True, full, 2 if full else 1, 4, full, load_sigma=0.2 * full)
    logits, noise, bias = inputs.logits, inputs.noise, inputs.bias
    route = inputs.route(moe_route, options)
    grads = [torch.ones_like(getattr(route, name)) if full else None for name in FLOATS]
    grads[0] = torch.ones(()).expand(24, 2)
    compiled = torch.ops.swin_moe
    torch.library.opcheck(
        compiled.moe_route_backward, (*grads, logits, noise, route.expert, *options)
    )
    leaf = logits.t().contiguous().t().requires_grad_()
    torch.library.opcheck(compiled.moe_route, (leaf, noise, bias, *options))


def test_the_formula_of_the_gradient() -> None:
    """The formula of the op's backward, for devices without a kernel, equals autograd."""
    for tokens, noise, bias, options in some_options(5, 2, 40):
        inputs = clear_inputs(tokens, 5, options.sigmoid, noise, bias).to(torch.float64)
        leaf = inputs.logits.clone().requires_grad_()
        route = dataclasses.replace(inputs, logits=leaf).route(moe_route_reference, options)
        outputs = [getattr(route, name) for name in FLOATS]
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(out.shape, generator=generator).double() for out in outputs]
        mine = backward_reference(*grads, inputs.logits, inputs.noise, route.expert, options)
        (theirs,) = torch.autograd.grad(outputs, leaf, grads)
        torch.testing.assert_close(mine, theirs)


def test_compiles_as_one_graph() -> None:
    options = RouteOptions(2, normalize=True, prioritized=True, capacity=6, load_sigma=0.1)

    def layer(logits: Tensor, x: Tensor) -> Tensor:
        route = moe_route(logits, None, None, options)
        rows = ops.moe_dispatch(x, route.source, route.destination)
        out = ops.moe_combine(2 * rows, route.gate, route.source, route.destination)
        return out.sum() + route.sums.square().sum() + route.scalars[0]

    x, logits = torch.randn(32, 8), torch.randn(32, 4, requires_grad=True)
    expected = layer(logits, x)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(logits, x)
    (grad,) = torch.autograd.grad(out, logits)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)
