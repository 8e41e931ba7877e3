"""Routing: the compiled op compared with the PyTorch reference and Tutel.

Each row times forward and backward, from logits to row maps and back to the gradient of the
logits, with noise, batch-prioritised queues, the load estimate, and normalised gates for k = 2.
Tutel's part is its ``extract_critical`` of the softmax with GShard's loss: no load estimate and no
row maps, so it does less. The contenders run in turn in one process; figures are medians. With
``--batch N`` the tokens are those of N images in stage 3 at 256 pixels.

    python -m benchmarks.moe_route [--json PATH] [--quick] [--batch N] [--device cuda]
        [--peers reference,tutel] [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness, kernels
from benchmarks.kernels import Job
from swin_moe.ops import Route, RouteOptions, moe_route, moe_route_reference

SHAPES = [(6272, 8), (6272, 32), (18432, 8), (18432, 32)]  # tokens, experts
CAPACITY_FACTOR = 1.25
MODE = "forward+backward"
Contender = Callable[[Tensor, Tensor, RouteOptions], Tensor]


def total(route: Route) -> Tensor:
    """Return a scalar from which every gradient flows."""
    return route.gate.sum() + route.sums.square().sum() + route.scalars[0]


def ours(logits: Tensor, noise: Tensor, options: RouteOptions) -> Tensor:
    return total(moe_route(logits, noise, None, options))


def reference(logits: Tensor, noise: Tensor, options: RouteOptions) -> Tensor:
    return total(moe_route_reference(logits, noise, None, options))


def tutel() -> Contender | None:
    """Return Tutel's routing, if Tutel is installed."""
    try:
        from tutel.impls.fast_dispatch import extract_critical
        from tutel.impls.losses import gshard_loss
    except ImportError:
        return None

    def run(logits: Tensor, noise: Tensor, options: RouteOptions) -> Tensor:
        critical, loss = extract_critical(
            (logits + noise).softmax(1),
            options.top_k,
            loss_fn=gshard_loss,
            capacity_factor=CAPACITY_FACTOR,
            batch_prioritized_routing=True,
            normalize_gate=options.normalize,
        )
        return sum(gate.sum() for gate in critical[3]) + loss

    return run


def forward_backward(
    contender: Contender, logits: Tensor, noise: Tensor, options: RouteOptions
) -> None:
    contender(logits.detach().requires_grad_(), noise, options).backward()


def name_of(tokens: int, experts: int, top_k: int) -> str:
    return f"T={tokens} E={experts} k={top_k}"


def measure(
    tokens: int, experts: int, top_k: int, options: argparse.Namespace
) -> dict[str, object]:
    """Measure the cell of a shape."""
    device = harness.device()
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=device)
    noise = torch.randn(tokens, experts, device=device) / experts
    how = RouteOptions(
        top_k,
        normalize=top_k > 1,
        prioritized=True,
        capacity=int(CAPACITY_FACTOR * top_k * tokens / experts),
        load_sigma=1.0 / experts,
    )
    peers = {"reference": reference, "tutel": tutel()}
    runs = {
        name: partial(forward_backward, run, logits, noise, how)
        for name, run in peers.items()
        if run is not None
    }
    mine = partial(forward_backward, ours, logits, noise, how)
    contenders = kernels.chosen(runs, options.peers, mine)
    times = kernels.contest(contenders, options.rounds, warmup=3)
    name = name_of(tokens, experts, top_k)
    return harness.cell(name, torch.float32, MODE, times.of, left_out=times.left_out)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    tokens = options.batch * kernels.TOKENS_OF_AN_IMAGE
    shapes = [(tokens, 8), (tokens, 32)] if tokens else SHAPES
    for count, experts in shapes[:1] if options.quick else shapes:
        for top_k in (1, 2):
            make = partial(measure, count, experts, top_k, options)
            yield Job(name_of(count, experts, top_k), torch.float32, MODE, make)


def main() -> None:
    options = kernels.arguments(__doc__ or "", ["reference", "tutel"], 25).parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 5)
    kernels.start(options)
    kernels.run("routing, ms", jobs(options), options)


if __name__ == "__main__":
    main()
