"""The compiled ops of an MoE layer, forward and backward, compared with references and peers.

``route`` goes from logits to row maps and back to the gradient of the logits, in fp32, with noise,
batch-prioritised queues, the load estimate, and normalised gates for k = 2. Tutel's part is its
``extract_critical`` of the softmax with GShard's loss: no load estimate and no row maps, so it does
less.

``dispatch`` is dispatch followed by combine, with identity experts, so that only the movement of
rows counts.

``experts`` is the feed-forward on packed rows. Peers: ``loop``, F.linear and F.gelu expert by
expert; ``grouped``, with torch's grouped_mm; ``bmm``, on rows padded to those of the largest
expert. ``limit`` is the time of one dense layer on all rows over ours. With ``--methods`` the peers
are the op's own ways to multiply, from which it chooses by shape.

The contenders run in turn in one process; figures are medians. With ``--batch N`` the tokens are
those of N images in stage 3 at 256 pixels.

    python -m benchmarks.moe_ops {route,dispatch,experts} [--json PATH] [--quick] [--methods]
        [--batch N] [--device cuda] [--peers NAME,...] [--dtypes float32,bfloat16] [--rounds N]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, kernels
from benchmarks.kernels import Job
from swin_moe import ops
from swin_moe.ops import RouteOptions

ROUTE_SHAPES = [(6272, 8), (6272, 32), (18432, 8), (18432, 32)]  # tokens, experts
DISPATCH_SHAPES = [(6272, 384, 8), (18432, 512, 8), (18432, 512, 32)]  # tokens, width, experts
# Rows of an expert on average, width, experts.
EXPERT_SHAPES = [
    (2304, 512, 8),
    (576, 512, 32),
    (784, 384, 8),
    (256, 192, 16),
    (64, 192, 32),
    (100, 96, 4),
    (16, 96, 8),
]
METHOD_SHAPES = [
    (rows, width, experts)
    for width in (96, 256, 512)
    for experts in (4, 32)
    for rows in (8, 32, 64, 128, 256)
    if rows * experts * width * width <= 1 << 30
]
METHODS = {"each": 1, "batched": 2, "grouped": 3}
PEERS = ["reference", "tutel", "loop", "grouped", "bmm"]
CAPACITY_FACTOR = 1.25
Runs = dict[str, Callable[[], object]]  # the contenders of a cell, ours included


def route(tokens: int, experts: int, top_k: int) -> Runs:
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=harness.device())
    noise = torch.randn_like(logits) / experts
    how = RouteOptions(
        top_k,
        normalize=top_k > 1,
        prioritized=True,
        capacity=int(CAPACITY_FACTOR * top_k * tokens / experts),
        load_sigma=1.0 / experts,
    )

    def total(op: Callable[..., ops.Route], leaf: Tensor) -> Tensor:
        """Return a scalar from which every gradient flows."""
        found = op(leaf, noise, None, how)
        return found.gate.sum() + found.sums.square().sum() + found.scalars[0]

    def tutel(leaf: Tensor) -> Tensor:
        from tutel.impls.fast_dispatch import extract_critical
        from tutel.impls.losses import gshard_loss

        critical, loss = extract_critical(
            (leaf + noise).softmax(1),
            top_k,
            loss_fn=gshard_loss,
            capacity_factor=CAPACITY_FACTOR,
            batch_prioritized_routing=True,
            normalize_gate=how.normalize,
        )
        return sum(gate.sum() for gate in critical[3]) + loss

    def step(contender: Callable[[Tensor], Tensor]) -> None:
        contender(logits.detach().requires_grad_()).backward()

    return {
        "ours": partial(step, partial(total, ops.moe_route)),
        "reference": partial(step, partial(total, ops.moe_route_reference)),
        "tutel": partial(step, tutel),
    }


def dispatch(tokens: int, width: int, experts: int, top_k: int, dtype: torch.dtype) -> Runs:
    """Move rows by the routes of random tokens, each expert's padded to its capacity."""
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=harness.device())
    capacity = math.ceil(CAPACITY_FACTOR * top_k * tokens / experts)
    how = RouteOptions(top_k, prioritized=True, capacity=capacity, padded=True)
    routes = ops.moe_route(logits, None, None, how)
    gate = routes.gate.detach().requires_grad_()
    maps = routes.source, routes.destination
    x = torch.randn(tokens, width, device=harness.device(), dtype=dtype)

    def tutel(leaf: Tensor) -> Tensor:
        from tutel import moe

        def columns(t: Tensor) -> list[Tensor]:
            return [column.contiguous() for column in t.unbind(1)]

        indices, slots = (columns(t.to(torch.int32)) for t in (routes.expert, routes.slot))
        critical = (experts, indices, slots, columns(gate), capacity, routes.counts)
        # As in its layer, rows have the dtype of the fp32 gate.
        rows = moe.fast_encode(leaf.float(), critical).to(dtype)
        return moe.fast_decode(rows.float(), critical).to(dtype)

    def step(contender: Callable[[Tensor], Tensor]) -> None:
        gate.grad = None
        contender(x.detach().requires_grad_()).backward(x)

    def moved(out: Callable[..., Tensor], back: Callable[..., Tensor], leaf: Tensor) -> Tensor:
        return back(out(leaf, *maps), gate, *maps)

    reference = partial(moved, ops.moe_dispatch_reference, ops.moe_combine_reference)
    return {
        "ours": partial(step, partial(moved, ops.moe_dispatch, ops.moe_combine)),
        "reference": partial(step, reference),
        "tutel": partial(step, tutel),
    }


def experts(mean: int, width: int, count: int, dtype: torch.dtype, methods: bool) -> Runs:
    """Multiply with ``count`` experts, which have ``mean`` rows on average."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        tensor = std * torch.randn(shape, generator=generator)
        return tensor.to(harness.device(), dtype).requires_grad_()

    total, hidden = mean * count, 4 * width
    uneven = (0.3 * torch.randn(count, generator=generator)).softmax(0)
    used = torch.full((count,), mean) if methods else (uneven * total).long()
    used[-1] += total - used.sum()
    used = used.to(harness.device())
    weights = [
        normal(count, hidden, width, std=width**-0.5),
        normal(count, hidden, std=0.1),
        normal(count, width, hidden, std=hidden**-0.5),
        normal(count, width, std=0.1),
    ]
    rows = normal(total, width)

    def step(contender: Callable[..., Tensor]) -> None:
        for tensor in (rows, *weights):
            tensor.grad = None
        contender(rows, used, *weights).backward(rows.detach())

    contenders: dict[str, Callable[..., Tensor]] = {"ours": ops.moe_experts}
    if methods:
        contenders |= {name: partial(by_method, method) for name, method in METHODS.items()}
    else:
        contenders |= {"loop": loop, "grouped": grouped, "bmm": bmm, "dense": dense}
    return {name: partial(step, contender) for name, contender in contenders.items()}


def by_method(method: int, *inputs: Tensor) -> Tensor:
    return torch.ops.swin_moe.moe_experts(*inputs, None, 0, 0.0, True, method)[0]


def loop(rows: Tensor, used: Tensor, *weights: Tensor) -> Tensor:
    parts = rows.split(used.tolist())
    experts = zip(parts, *(weight.unbind() for weight in weights), strict=True)
    return torch.cat([feed_forward(x, *of_expert) for x, *of_expert in experts])


def feed_forward(x: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc1, fc1_bias)), fc2, fc2_bias)


def dense(rows: Tensor, used: Tensor, *weights: Tensor) -> Tensor:
    return feed_forward(rows, *(weight[0] for weight in weights))


def grouped(
    rows: Tensor, used: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> Tensor:
    ends = used.cumsum(0, dtype=torch.int32)
    expert = torch.repeat_interleave(used, output_size=len(rows))
    hidden = F.grouped_mm(rows, fc1.transpose(1, 2), offs=ends) + fc1_bias[expert]
    return F.grouped_mm(F.gelu(hidden), fc2.transpose(1, 2), offs=ends) + fc2_bias[expert]


def bmm(
    rows: Tensor, used: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> Tensor:
    x = torch.nn.utils.rnn.pad_sequence(rows.split(used.tolist()), batch_first=True)
    hidden = F.gelu(torch.baddbmm(fc1_bias[:, None], x, fc1.transpose(1, 2)))
    out = torch.baddbmm(fc2_bias[:, None], hidden, fc2.transpose(1, 2))
    return torch.cat([part[:count] for part, count in zip(out, used.tolist(), strict=True)])


def job(
    options: argparse.Namespace,
    name: str,
    dtype: torch.dtype,
    make: Callable[[], Runs],
    most: int = 10**6,
) -> Job:
    """Return the cell whose contenders ``make`` returns, with at most ``most`` rounds."""

    def measure() -> dict[str, Any]:
        runs = make()
        wanted = [*options.peers, *METHODS, "dense"]
        contenders = kernels.chosen(runs, wanted, runs["ours"])
        times = kernels.contest(contenders, min(options.rounds, most), warmup=3)
        limit = times.of.pop("dense", None)
        more = {} if limit is None else {"limit": round(limit / times.of["ours"], 2)}
        return harness.cell(name, dtype, mode, times.of, left_out=times.left_out, **more)

    mode = "forward+backward"
    return Job(name, dtype, mode, measure)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    tokens = options.batch * kernels.TOKENS_OF_AN_IMAGE
    dtypes = [kernels.DTYPES[name] for name in options.dtypes]
    if options.op == "route":
        shapes = [(tokens, 8), (tokens, 32)] if tokens else ROUTE_SHAPES
        for count, of in shapes[:1] if options.quick else shapes:
            for k in (1, 2):
                make = partial(route, count, of, k)
                yield job(options, f"T={count} E={of} k={k}", torch.float32, make)
    elif options.op == "dispatch":
        shapes = [(tokens, 512, 8), (tokens, 512, 32)] if tokens else DISPATCH_SHAPES
        for shape in shapes[:1] if options.quick else shapes:
            for k in (1, 2):
                for dtype in dtypes:
                    name = "T={} D={} E={} k={}".format(*shape, k)
                    yield job(options, name, dtype, partial(dispatch, *shape, k, dtype))
    else:
        shapes = METHOD_SHAPES if options.methods else EXPERT_SHAPES
        if tokens:
            shapes = [(tokens // 8, 512, 8), (tokens // 32, 512, 32)]
        for shape in shapes[-2:] if options.quick else shapes:
            for dtype in dtypes:
                make = partial(experts, *shape, dtype, options.methods)
                long = harness.device() == "cpu" and shape[0] * shape[2] > 10000
                most = 5 if long else options.rounds
                yield job(options, "N={} D={} E={}".format(*shape), dtype, make, most)


def main() -> None:
    parser = kernels.arguments(__doc__ or "", PEERS, 15, ["float32", "bfloat16"])
    parser.add_argument("op", choices=["route", "dispatch", "experts"])
    parser.add_argument("--methods", action="store_true", help="the experts' own ways")
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 5)
    kernels.start(options)
    more = ["limit"] if options.op == "experts" and not options.methods else []
    kernels.run(f"{options.op}, ms", jobs(options), options, *more)


if __name__ == "__main__":
    main()
