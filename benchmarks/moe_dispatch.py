"""Expert dispatch and combine: the compiled ops against the PyTorch reference and Tutel.

Each row times forward and backward of dispatch followed by combine, with identity experts, so that
only the movement of rows counts. The contenders run in turn in one process; figures are medians.

    python -m benchmarks.moe_dispatch [--json PATH] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from swin_moe.config import MoEConfig
from swin_moe.moe.backends.fused import KERNELS
from swin_moe.moe.plan import RouteContext, RoutingPlan
from swin_moe.moe.token_choice import route
from swin_moe.ops import (
    moe_combine,
    moe_combine_reference,
    moe_dispatch,
    moe_dispatch_reference,
)

SHAPES = [(6272, 384, 8), (18432, 512, 8), (18432, 512, 32)]  # tokens, width, experts
Contender = Callable[[Tensor, RoutingPlan], Tensor]


def ours(x: Tensor, plan: RoutingPlan) -> Tensor:
    rows = moe_dispatch(x, plan.source, plan.destination)
    return moe_combine(rows, plan.gate, plan.source, plan.destination)


def reference(x: Tensor, plan: RoutingPlan) -> Tensor:
    rows = moe_dispatch_reference(x, plan.source, plan.destination)
    return moe_combine_reference(rows, plan.gate, plan.source, plan.destination)


def tutel() -> Contender | None:
    """Tutel's encode and decode of the same plan, where Tutel is installed."""
    try:
        from tutel import moe
    except ImportError:
        return None

    def run(x: Tensor, plan: RoutingPlan) -> Tensor:
        def columns(t: Tensor) -> list[Tensor]:
            return [column.contiguous() for column in t.unbind(1)]

        indices, slots = (columns(t.to(torch.int32)) for t in (plan.expert, plan.slot))
        experts = plan.counts.numel()
        critical = (experts, indices, slots, columns(plan.gate), plan.capacity, plan.counts)
        # As its layer does: rows travel in the dtype of the fp32 gate.
        rows = moe.fast_encode(x.float(), critical).to(x.dtype)
        return moe.fast_decode(rows.float(), critical).to(x.dtype)

    return run


def forward_backward(contender: Contender, x: Tensor, plan: RoutingPlan) -> None:
    leaf = x.detach().requires_grad_()
    plan.gate.grad = None
    contender(leaf, plan).backward(x)


def main() -> None:
    options = harness.arguments(__doc__ or "").parse_args()
    harness.tuned_process()
    device = harness.device()
    contenders = {"reference": reference, "tutel": tutel(), "ours": ours}
    cells, rows = [], []
    for tokens, width, experts in SHAPES[:1] if options.quick else SHAPES:
        for top_k in (1, 2):
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(0)
                moe = MoEConfig(num_experts=experts, top_k=top_k, gate_noise=0, balance="gshard")
                logits = torch.randn(tokens, experts, device=device)
                plan = route(logits, moe, RouteContext(KERNELS, padded=True)).plan
                assert isinstance(plan, RoutingPlan)
                plan.gate.requires_grad_()
                x = torch.randn(tokens, width, device=device, dtype=dtype)
                runs = {
                    name: partial(forward_backward, run, x, plan)
                    for name, run in contenders.items()
                    if run is not None
                }
                times = harness.interleaved(runs, 5 if options.quick else 25, warmup=3)
                name = f"T={tokens} D={width} E={experts} k={top_k}"
                cells.append(harness.cell(name, dtype, "forward+backward", times))
                rows.append(harness.row(cells[-1]))
    harness.report("dispatch and combine, ms", harness.columns(), rows)
    harness.write_json(options.json, cells)


if __name__ == "__main__":
    main()
