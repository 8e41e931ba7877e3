"""Expert dispatch and combine: the compiled ops against the PyTorch reference and Tutel.

Each row times forward and backward of dispatch followed by combine, with identity experts, so that
only the movement of rows counts. The contenders run in turn in one process; figures are medians.

    python benchmarks/moe_dispatch.py [--json PATH] [--quick]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe.plan import RoutingPlan
from swin_moe.moe.router import route
from swin_moe.ops import (
    moe_combine,
    moe_combine_reference,
    moe_dispatch,
    moe_dispatch_reference,
)

SHAPES = [(6272, 384, 8), (18432, 512, 8), (18432, 512, 32)]  # tokens, width, experts
Contender = Callable[[Tensor, RoutingPlan], Tensor]


def ours(x: Tensor, plan: RoutingPlan) -> Tensor:
    source, destination = plan.row_index()
    return moe_combine(moe_dispatch(x, source, destination), plan.gate, source, destination)


def reference(x: Tensor, plan: RoutingPlan) -> Tensor:
    source, destination = plan.row_index()
    rows = moe_dispatch_reference(x, source, destination)
    return moe_combine_reference(rows, plan.gate, source, destination)


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


def seconds(contender: Contender, x: Tensor, plan: RoutingPlan) -> float:
    leaf = x.detach().requires_grad_()
    plan.gate.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = contender(leaf, plan)
    out.backward(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(contenders: dict[str, Contender], x: Tensor, plan: RoutingPlan, rounds: int):
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 3):
        for name, contender in contenders.items():
            taken = seconds(contender, x, plan)
            if turn >= 3:  # the first ones warm up
                times[name].append(taken)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--quick", action="store_true", help="one shape and few rounds")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contenders = {"reference": reference, "tutel": tutel(), "ours": ours}
    contenders = {name: run for name, run in contenders.items() if run is not None}
    cells = []
    for tokens, width, experts in SHAPES[:1] if arguments.quick else SHAPES:
        for top_k in (1, 2):
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(0)
                moe = MoEConfig(num_experts=experts, top_k=top_k, gate_noise=0, balance="gshard")
                plan = route(torch.randn(tokens, experts, device=device), moe, training=True).plan
                plan.gate.requires_grad_()
                x = torch.randn(tokens, width, device=device, dtype=dtype)
                found = measure(contenders, x, plan, 5 if arguments.quick else 25)
                mine = found.pop("ours")
                cells.append(
                    {
                        "name": f"T={tokens} D={width} E={experts} k={top_k}",
                        "dtype": str(dtype).removeprefix("torch."),
                        "mode": "forward+backward",
                        "unit": "ms",
                        "ours": round(mine, 3),
                        "peers": {name: round(peer, 3) for name, peer in found.items()},
                        "speedup": round(min(found.values()) / mine, 2),
                    }
                )
                print(
                    "{name:32} {dtype:9} ours {ours:8.2f} ms  peers {peers}  × {speedup}".format(
                        **cells[-1]
                    )
                )
    if arguments.json:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
        machine = {"device": name, "threads": torch.get_num_threads()}
        report = {"versions": {"torch": torch.__version__}, "machine": machine, "cells": cells}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
