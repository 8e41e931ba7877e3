"""Inputs and options for the tests of the routing, and the comparison with fp64."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor

from swin_moe.ops import Route, RouteOptions, moe_route, moe_route_reference

INTEGERS = ("expert", "slot", "source", "destination", "counts", "first", "used")
FLOATS = ("gate", "sums", "scalars")


@dataclasses.dataclass
class Inputs:
    logits: Tensor
    noise: Tensor | None = None
    bias: Tensor | None = None

    def to(self, *args: object) -> Inputs:
        parts = (self.logits, self.noise, self.bias)
        return Inputs(*(None if part is None else part.to(*args) for part in parts))

    def route(self, function: Callable[..., Route], options: RouteOptions) -> Route:
        return function(self.logits, self.noise, self.bias, options)


def clear_inputs(
    tokens: int, experts: int, sigmoid: bool, noise: bool, bias: bool, seed: int = 0
) -> Inputs:
    """Return inputs whose order no rounding changes: equal exactly, or far apart.

    Tokens are drawn from a few rows with values in quarters, so that many tokens and experts tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def quarters(rows: int) -> Tensor:
        return torch.randint(-12, 13, (rows, experts), generator=generator) / 4.0

    rows, more = quarters(40), quarters(40) * noise
    shift = torch.randint(-2, 3, (experts,), generator=generator) / 16.0 * bias
    noisy = (rows + more).double()
    score = noisy.sigmoid() if sigmoid else noisy.softmax(1)
    by = score + shift
    gap = (by[:, :, None] - by[:, None]).abs()
    same = (noisy[:, :, None] == noisy[:, None]) & (shift[:, None] == shift)
    fine = ((gap > 2e-6) | same).all(2).all(1)
    best = score.amax(1)
    for row in range(1, 40):
        fine[row] &= bool(((best[:row] - best[row]).abs() > 2e-6).all())
    fine[0] = True
    usable = fine.nonzero()[:, 0]
    pick = usable[torch.randint(0, len(usable), (tokens,), generator=generator)]
    return Inputs(rows[pick], more[pick] if noise else None, shift if bias else None)


def gradients(inputs: Inputs, function: Callable[..., Route], options: RouteOptions) -> Tensor:
    """Return the gradient of all three results, with a different weight for each element."""
    leaf = inputs.logits.detach().requires_grad_()
    route = function(leaf, inputs.noise, inputs.bias, options)
    generator = torch.Generator().manual_seed(1)
    loss = 0.01 * route.scalars[0]
    for part in (route.gate, route.sums):
        loss = loss + (part * torch.randn(part.shape, generator=generator).to(part)).sum()
    return torch.autograd.grad(loss, leaf)[0]


def check(
    inputs: Inputs,
    options: RouteOptions,
    device: str = "cpu",
    function: Callable[..., Route] = moe_route,
) -> None:
    """Compare a routing, forward and backward, with the reference in fp64."""
    exact = inputs.to(torch.float64).route(moe_route_reference, options)
    ours = inputs.to(device).route(function, options)
    for name in INTEGERS:
        mine, theirs = getattr(ours, name).cpu(), getattr(exact, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), (name, options)
    scale = max(len(inputs.logits), 1)
    for name, size in (("gate", 1), ("sums", scale), ("scalars", 10 * scale)):
        mine, theirs = getattr(ours, name).cpu(), getattr(exact, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=1e-6 * size)
    mine = gradients(inputs.to(device), function, options).cpu()
    theirs = gradients(inputs.to(torch.float64), moe_route_reference, options)
    torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=1e-5)


def some_options(
    experts: int, top_k: int, number: int
) -> list[tuple[int, bool, bool, RouteOptions]]:
    """Return a fixed sample of combinations of tokens, noise, bias and options."""
    flags = (False, True)
    capacities = [
        (0, False),
        (1, False),
        (3, False),
        (1000, False),
        (1, True),
        (3, True),
        (40, True),
    ]
    sizes = [(0, 1), (1, 1), (37, 1), (301, 1), (0, 4), (4, 4), (36, 4), (600, 4)]
    every = itertools.product(
        sizes, flags, flags, flags, flags, flags, capacities, (0.0, 1.0 / experts, 1.0)
    )
    result = []
    draw = random.Random(1000 * experts + top_k)
    for (tokens, groups), noise, bias, sigmoid, normalize, prioritized, queue, sigma in draw.sample(
        list(every), number
    ):
        options = RouteOptions(
            top_k, sigmoid, normalize, prioritized, groups, *queue, load_sigma=sigma
        )
        result.append((tokens, noise, bias, options))
    return result


SIZES = [(E, k) for E in (2, 4, 5, 8, 32, 64) for k in sorted({1, 2, min(3, E), E})]
