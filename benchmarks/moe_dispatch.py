"""Expert dispatch and combine: the compiled ops compared with the PyTorch reference and Tutel.

A cell times forward and backward of dispatch followed by combine, with identity experts, so that
only the movement of rows counts. The contenders run in turn in one process; figures are medians.

    python -m benchmarks.moe_dispatch [--json PATH] [--quick]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import harness, kernels
from benchmarks.kernels import Job
from swin_moe.ops import (
    Route,
    RouteOptions,
    moe_combine,
    moe_combine_reference,
    moe_dispatch,
    moe_dispatch_reference,
    moe_route,
)

SHAPES = [(6272, 384, 8), (18432, 512, 8), (18432, 512, 32)]  # tokens, width, experts
CAPACITY_FACTOR = 1.25
MODE = "forward+backward"


class Plan(NamedTuple):
    """The routes of the tokens, and the capacity of an expert."""

    route: Route
    gate: Tensor
    capacity: int


Contender = Callable[[Tensor, Plan], Tensor]


def ours(x: Tensor, plan: Plan) -> Tensor:
    rows = moe_dispatch(x, plan.route.source, plan.route.destination)
    return moe_combine(rows, plan.gate, plan.route.source, plan.route.destination)


def reference(x: Tensor, plan: Plan) -> Tensor:
    rows = moe_dispatch_reference(x, plan.route.source, plan.route.destination)
    return moe_combine_reference(rows, plan.gate, plan.route.source, plan.route.destination)


def tutel() -> Contender | None:
    """Return Tutel's encode and decode of the same plan, if Tutel is installed."""
    try:
        from tutel import moe
    except ImportError:
        return None

    def run(x: Tensor, plan: Plan) -> Tensor:
        route = plan.route

        def columns(t: Tensor) -> list[Tensor]:
            return [column.contiguous() for column in t.unbind(1)]

        indices, slots = (columns(t.to(torch.int32)) for t in (route.expert, route.slot))
        experts = route.counts.numel()
        critical = (experts, indices, slots, columns(plan.gate), plan.capacity, route.counts)
        # As in its layer, rows have the dtype of the fp32 gate.
        rows = moe.fast_encode(x.float(), critical).to(x.dtype)
        return moe.fast_decode(rows.float(), critical).to(x.dtype)

    return run


def forward_backward(contender: Contender, x: Tensor, plan: Plan) -> None:
    leaf = x.detach().requires_grad_()
    plan.gate.grad = None
    contender(leaf, plan).backward(x)


def make_plan(tokens: int, experts: int, top_k: int) -> Plan:
    """Route random tokens, with the rows of each expert padded to its capacity."""
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=harness.device())
    capacity = math.ceil(CAPACITY_FACTOR * top_k * tokens / experts)
    how = RouteOptions(top_k, prioritized=True, capacity=capacity, padded=True)
    route = moe_route(logits, None, None, how)
    return Plan(route, route.gate.detach().requires_grad_(), capacity)


def name_of(shape: tuple[int, int, int], top_k: int) -> str:
    tokens, width, experts = shape
    return f"T={tokens} D={width} E={experts} k={top_k}"


def measure(
    shape: tuple[int, int, int], top_k: int, dtype: torch.dtype, options: argparse.Namespace
) -> dict[str, object]:
    """Measure the cell of a shape and dtype."""
    tokens, width, experts = shape
    plan = make_plan(tokens, experts, top_k)
    x = torch.randn(tokens, width, device=harness.device(), dtype=dtype)
    peers = {"reference": reference, "tutel": tutel()}
    runs = {
        name: partial(forward_backward, run, x, plan)
        for name, run in peers.items()
        if run is not None
    }
    mine = partial(forward_backward, ours, x, plan)
    contenders = kernels.chosen(runs, options.peers, mine)
    times = kernels.contest(contenders, options.rounds, warmup=3)
    name = name_of(shape, top_k)
    return harness.cell(name, dtype, MODE, times.of, left_out=times.left_out)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    tokens = options.batch * kernels.TOKENS_OF_AN_IMAGE
    shapes = [(tokens, 512, 8), (tokens, 512, 32)] if tokens else SHAPES
    for shape in shapes[:1] if options.quick else shapes:
        for top_k in (1, 2):
            for dtype in (kernels.DTYPES[name] for name in options.dtypes):
                make = partial(measure, shape, top_k, dtype, options)
                yield Job(name_of(shape, top_k), dtype, MODE, make)


def main() -> None:
    peers, dtypes = ["reference", "tutel"], ["float32", "bfloat16"]
    options = kernels.arguments(__doc__ or "", peers, 25, dtypes).parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 5)
    kernels.start(options)
    kernels.run("dispatch and combine, ms", jobs(options), options)


if __name__ == "__main__":
    main()
