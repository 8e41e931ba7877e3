"""Routing: the compiled op against the PyTorch reference and Tutel.

Each row times forward and backward, from logits to row maps and back to the gradient of the
logits, with noise, batch-prioritised queues, the load estimate, and normalised gates for k = 2.
Tutel's part is its ``extract_critical`` of the softmax with GShard's loss: no load estimate and no
row maps, so it does less. The contenders run in turn in one process; figures are medians.

    python -m benchmarks.moe_route [--json PATH] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from swin_moe.ops import Route, RouteOptions, moe_route, moe_route_reference

SHAPES = [(6272, 8), (6272, 32), (18432, 8), (18432, 32)]  # tokens, experts
CAPACITY_FACTOR = 1.25
Contender = Callable[[Tensor, Tensor, RouteOptions], Tensor]


def total(route: Route) -> Tensor:
    """A scalar that every gradient flows from."""
    return route.gate.sum() + route.sums.square().sum() + route.scalars[0]


def ours(logits: Tensor, noise: Tensor, options: RouteOptions) -> Tensor:
    return total(moe_route(logits, noise, None, options))


def reference(logits: Tensor, noise: Tensor, options: RouteOptions) -> Tensor:
    return total(moe_route_reference(logits, noise, None, options))


def tutel() -> Contender | None:
    """Tutel's routing, where Tutel is installed."""
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


def main() -> None:
    arguments = harness.arguments(__doc__ or "").parse_args()
    harness.tuned_process()
    device = harness.device()
    contenders = {"reference": reference, "tutel": tutel(), "ours": ours}
    cells, rows = [], []
    for tokens, experts in SHAPES[:1] if arguments.quick else SHAPES:
        for top_k in (1, 2):
            torch.manual_seed(0)
            logits = torch.randn(tokens, experts, device=device)
            noise = torch.randn(tokens, experts, device=device) / experts
            options = RouteOptions(
                top_k,
                normalize=top_k > 1,
                prioritized=True,
                capacity=int(CAPACITY_FACTOR * top_k * tokens / experts),
                load_sigma=1.0 / experts,
            )
            runs = {
                name: partial(forward_backward, run, logits, noise, options)
                for name, run in contenders.items()
                if run is not None
            }
            times = harness.interleaved(runs, 5 if arguments.quick else 25, warmup=3)
            name = f"T={tokens} E={experts} k={top_k}"
            cells.append(harness.cell(name, torch.float32, "forward+backward", times))
            rows.append(harness.row(cells[-1]))
    harness.report("routing, ms", harness.columns(), rows)
    harness.write_json(arguments.json, cells)


if __name__ == "__main__":
    main()
