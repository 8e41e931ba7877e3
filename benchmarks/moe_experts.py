"""The experts' feed-forward, forward and backward: the op compared with other products.

Peers, all on the same packed rows: ``loop``, F.linear and F.gelu expert by expert; ``grouped``,
with torch's grouped_mm; ``bmm``, on rows padded to those of the largest expert. ``limit`` is the
time of one dense layer on all rows over ours. With ``--methods`` the peers are the op's own ways
to multiply, from which it chooses by shape. With ``--batch N`` the tokens are those of N images in
stage 3 at 256 pixels.

    python -m benchmarks.moe_experts [--json PATH] [--quick] [--methods] [--batch N] [--device cuda]
        [--peers loop,grouped,bmm] [--dtypes float32,bfloat16] [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, kernels
from benchmarks.kernels import Job
from swin_moe.ops import moe_experts

# Rows of an expert on average, width, experts.
SHAPES = [
    (2304, 512, 8),
    (576, 512, 32),
    (784, 384, 8),
    (256, 192, 16),
    (64, 192, 32),
    (100, 96, 4),
    (16, 96, 8),
]
MODE = "forward+backward"
METHODS = {"each": 1, "batched": 2, "grouped": 3}
METHOD_SHAPES = [
    (rows, width, experts)
    for width in (96, 256, 512)
    for experts in (4, 32)
    for rows in (8, 32, 64, 128, 256)
    if rows * experts * width * width <= 1 << 30
]
Weights = list[Tensor]
Contender = Callable[[Tensor, Tensor, Weights], Tensor]


def ours(rows: Tensor, used: Tensor, weights: Weights) -> Tensor:
    return moe_experts(rows, used, *weights)


def loop(rows: Tensor, used: Tensor, weights: Weights) -> Tensor:
    parts = rows.split(used.tolist())
    experts = zip(parts, *(weight.unbind() for weight in weights), strict=True)
    return torch.cat([feed_forward(x, *of_expert) for x, *of_expert in experts])


def feed_forward(x: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc1, fc1_bias)), fc2, fc2_bias)


def dense(rows: Tensor, used: Tensor, weights: Weights) -> Tensor:
    return feed_forward(rows, *(weight[0] for weight in weights))


def grouped(rows: Tensor, used: Tensor, weights: Weights) -> Tensor:
    fc1, fc1_bias, fc2, fc2_bias = weights
    ends = used.cumsum(0, dtype=torch.int32)
    expert = torch.repeat_interleave(used, output_size=len(rows))
    hidden = F.grouped_mm(rows, fc1.transpose(1, 2), offs=ends) + fc1_bias[expert]
    return F.grouped_mm(F.gelu(hidden), fc2.transpose(1, 2), offs=ends) + fc2_bias[expert]


def bmm(rows: Tensor, used: Tensor, weights: Weights) -> Tensor:
    fc1, fc1_bias, fc2, fc2_bias = weights
    x = torch.nn.utils.rnn.pad_sequence(rows.split(used.tolist()), batch_first=True)
    hidden = F.gelu(torch.baddbmm(fc1_bias[:, None], x, fc1.transpose(1, 2)))
    out = torch.baddbmm(fc2_bias[:, None], hidden, fc2.transpose(1, 2))
    return torch.cat([part[:count] for part, count in zip(out, used.tolist(), strict=True)])


def by_method(method: int, rows: Tensor, used: Tensor, weights: Weights) -> Tensor:
    return torch.ops.swin_moe.moe_experts(rows, used, *weights, None, 0, 0.0, True, method)[0]


def make_inputs(
    mean: int, width: int, experts: int, dtype: torch.dtype, even: bool
) -> tuple[Tensor, Tensor, Weights]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        tensor = std * torch.randn(shape, generator=generator)
        return tensor.to(harness.device(), dtype).requires_grad_()

    total, hidden = mean * experts, 4 * width
    uneven = (0.3 * torch.randn(experts, generator=generator)).softmax(0)
    used = torch.full((experts,), mean) if even else (uneven * total).long()
    used[-1] += total - used.sum()
    weights = [
        normal(experts, hidden, width, std=width**-0.5),
        normal(experts, hidden, std=0.1),
        normal(experts, width, hidden, std=hidden**-0.5),
        normal(experts, width, std=0.1),
    ]
    return normal(total, width), used.to(harness.device()), weights


def forward_backward(contender: Contender, rows: Tensor, used: Tensor, weights: Weights) -> None:
    for tensor in (rows, *weights):
        tensor.grad = None
    contender(rows, used, weights).backward(rows.detach())


def name_of(mean: int, width: int, experts: int) -> str:
    return f"N={mean} D={width} E={experts}"


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, options: argparse.Namespace
) -> dict[str, object]:
    """Measure the cell of a shape and dtype."""
    inputs = make_inputs(*shape, dtype, even=options.methods)
    peers: dict[str, Contender] = {"loop": loop, "grouped": grouped, "bmm": bmm}
    if options.methods:
        peers = {name: partial(by_method, method) for name, method in METHODS.items()}
    wanted = list(peers) if options.methods else [*options.peers, "dense"]
    runs = {
        name: partial(forward_backward, run, *inputs)
        for name, run in {**peers, "dense": dense}.items()
    }
    mine = partial(forward_backward, ours, *inputs)
    long = harness.device() == "cpu" and shape[0] * shape[2] > 10000
    rounds = min(options.rounds, 5) if long else options.rounds
    times = kernels.contest(kernels.chosen(runs, wanted, mine), rounds)
    limit = times.of.pop("dense", None)
    more = {} if limit is None else {"limit": round(limit / times.of["ours"], 2)}
    return harness.cell(name_of(*shape), dtype, MODE, times.of, left_out=times.left_out, **more)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    tokens = options.batch * kernels.TOKENS_OF_AN_IMAGE
    shapes = METHOD_SHAPES if options.methods else SHAPES
    if tokens:
        shapes = [(tokens // 8, 512, 8), (tokens // 32, 512, 32)]
    for shape in shapes[-2:] if options.quick else shapes:
        for dtype in (kernels.DTYPES[name] for name in options.dtypes):
            yield Job(name_of(*shape), dtype, MODE, partial(measure, shape, dtype, options))


def main() -> None:
    peers, dtypes = ["loop", "grouped", "bmm"], ["float32", "bfloat16"]
    parser = kernels.arguments(__doc__ or "", peers, 15, dtypes)
    parser.add_argument("--methods", action="store_true", help="the op's own ways")
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 5)
    kernels.start(options)
    more = [] if options.methods else ["limit"]
    kernels.run("experts, ms", jobs(options), options, *more)


if __name__ == "__main__":
    main()
