"""An update of AdamW with bf16 moments, compared with torch's fused AdamW and with the reference.

An element moves 20 bytes in our pass: weights and pairs of moments are read and written, the
gradient is read. torch's has fp32 moments and moves 28.

The contenders run in turn in one process; figures are medians.

    python -m benchmarks.adamw [--json PATH] [--quick] [--device cuda] [--peers NAME,...]
        [--rounds N]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import harness, kernels
from benchmarks.kernels import Job
from swin_moe import ops
from swin_moe.ops import AdamwFactors

SIZES = [1 << 16, 1 << 20, 1 << 24, 50_000_000]  # the last: a sub-group of ZeRO-3
BYTES = 20  # of an element
RATES = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
PEERS = ["torch", "reference"]


def update(size: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    device = harness.device()
    weights = torch.nn.Parameter(torch.randn(size, device=device))
    gradient = 1e-3 * torch.randn(size, device=device)
    weights.grad = gradient
    optimizer = torch.optim.AdamW([weights], fused=True, **RATES)  # type: ignore[arg-type]
    mine, pairs = weights.detach().clone(), torch.zeros(size, device=device)
    step = 0

    def ours(function: Callable[..., None]) -> None:
        nonlocal step
        step += 1
        function(mine, gradient, pairs, AdamwFactors.of(step, **RATES))  # type: ignore[arg-type]

    return {
        "ours": partial(ours, ops.adamw_),
        "reference": partial(ours, ops.adamw_reference_),
        "torch": optimizer.step,
    }


def main() -> None:
    options = kernels.arguments(__doc__, PEERS, rounds=15)
    found = options.parse_args()
    kernels.start(found)

    def measure(size: int) -> dict[str, object]:
        runs = update(size)
        runs = {name: run for name, run in runs.items() if name in ("ours", *found.peers)}
        times = kernels.contest(runs, 3 if found.quick else found.rounds)
        seconds = times.of["ours"] / 1e3
        return harness.cell(
            f"{size} elements", torch.float32, "update", times.of,
            gb_per_s=round(BYTES * size / seconds / 1e9, 1),
            left_out=times.left_out,
        )  # fmt: skip

    jobs = [
        Job(f"{size} elements", torch.float32, "update", partial(measure, size))
        for size in (SIZES[:2] if found.quick else SIZES)
    ]
    kernels.run("AdamW with bf16 moments, ms", jobs, found, "gb_per_s")


if __name__ == "__main__":
    main()
