"""Shifted-window attention: our op compared with its peers, from qkv map to output map.

Stages 1 to 4 of Swin V2 Tiny at 256 px, windows 8 and 16, batch 8, shifted where the window leaves
room. Contenders run in turn in one process under one allocator, with denormals flushed; figures are
medians in milliseconds. The floor is the larger of two: FLOPs over the measured rate of a matrix
product, and bytes (q, k, v and output, their gradients) over the measured rate of a copy.

    python -m benchmarks.window_attention [--json PATH] [--quick] [--rounds N] [--batch N]
        [--device cuda] [--peers timm,sdpa,"timm compiled","sdpa compiled","flex compiled"]
        [--dtypes bfloat16,float32] [--windows 8,16] [--stages 1,2,3,4]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import attention_peers, harness, kernels
from benchmarks.attention_peers import Inputs
from benchmarks.kernels import Ceilings, Job
from swin_moe import ops
from swin_moe.ops.window_reference import Windows

BATCH, HEAD_DIM, SIDE = 8, 32, 64
PEERS = ["timm", "timm compiled", "sdpa", "sdpa compiled", "flex compiled"]
TOLERANCE = 0.1  # of the norm in half precision: peers round logits of up to 26 to 8 bits
Contender = Callable[[Inputs], Tensor]


def ours(inputs: Inputs) -> Tensor:
    return ops.window_attention(
        inputs.qkv,
        inputs.bias,
        inputs.scale,
        window_size=inputs.window_size,
        shift_size=inputs.shift_size,
    )


def make_inputs(stage: int, window: int, dtype: torch.dtype, batch: int) -> Inputs:
    """Return random tensors of a stage (from 0); the logits are as at the start of training."""
    device = harness.device()
    side, heads = SIDE >> stage, 3 << stage
    window = min(window, side)
    shift = window // 2 if side > window else 0
    torch.manual_seed(0)
    qkv = torch.randn(batch, side, side, 3, heads, HEAD_DIM, device=device).to(dtype)
    bias = 16 * torch.rand(heads, window**2, window**2, device=device)
    scale = torch.full((heads, 1, 1), 2.3026, device=device)
    windows = Windows((window, window), (shift, shift))
    mask = windows.mask(side, side, qkv)
    return Inputs(qkv, bias, scale, mask, window, shift)


def contenders(backward: bool, wanted: list[str]) -> dict[str, Contender]:
    """Compile the wanted peers again: otherwise dynamo switches to dynamic shapes."""
    found: dict[str, Contender] = {
        "timm": attention_peers.timm_attention,
        "sdpa": attention_peers.sdpa_attention,
    }
    if any("compiled" in name for name in wanted):
        torch._dynamo.reset()
        found |= {f"{name} compiled": torch.compile(peer) for name, peer in found.items()}
        if harness.device() == "cuda" or not backward:  # flex_attention has no backward on a CPU
            found["flex compiled"] = attention_peers.flex_attention
    return {name: found[name] for name in PEERS if name in found and name in wanted}


def forward(contender: Contender, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return contender(inputs)


def forward_backward(contender: Contender, inputs: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = (inputs.qkv, inputs.bias, inputs.scale)
    return torch.autograd.grad(contender(inputs), leaves, grad)


def runs(
    inputs: Inputs, backward: bool, wanted: list[str]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Return the contenders with the right output, and why others are left out."""
    expected = forward(ours, inputs).float()
    if backward:
        for leaf in (inputs.qkv, inputs.bias, inputs.scale):
            leaf.requires_grad_()
    grad = torch.randn_like(expected).to(inputs.qkv.dtype)
    tolerance = 1e-3 if inputs.qkv.dtype == torch.float32 else TOLERANCE
    result: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    for name, contender in (contenders(backward, wanted) | {"ours": ours}).items():
        try:
            difference = forward(contender, inputs).float() - expected
            error = (difference.norm() / expected.norm()).item()
        except Exception as problem:
            left_out[name] = kernels.first_line(problem)
            print(f"  {name} does not run here: {left_out[name]}", flush=True)
            kernels.release()
            continue
        if not error <= tolerance:
            left_out[name] = f"differs from ours by {error:.2g} of the output"
            print(f"  {name} {left_out[name]} ({error})", flush=True)
        elif backward:
            result[name] = partial(forward_backward, contender, inputs, grad)
        else:
            result[name] = partial(forward, contender, inputs)
    wrong = [name for name, why in left_out.items() if why.startswith("differs")]
    if "ours" in wrong or (wrong and len(result) == 1):
        raise RuntimeError(f"our output is not finite, or that of every peer: {left_out}")
    return result, left_out


def floor(inputs: Inputs, backward: bool, flops_rate: float, bytes_rate: float) -> float:
    """Return the least milliseconds of an implementation that recomputes the probabilities."""
    B, H, W, _, heads, d = inputs.qkv.shape
    tokens, N = B * H * W, inputs.window_size**2
    products = 7 if backward else 2
    flops = products * 2 * tokens * N * heads * d
    maps = (4 + 8) if backward else 4  # q, k, v, out; then those, grad_out and three gradients
    moved = maps * tokens * heads * d * inputs.qkv.element_size()
    return 1e3 * max(flops / flops_rate, moved / bytes_rate)


def measure(
    stage: int,
    window: int,
    dtype: torch.dtype,
    backward: bool,
    options: argparse.Namespace,
    best: Ceilings,
) -> dict[str, object]:
    """Measure the cell of a stage, window, dtype and direction."""
    inputs = make_inputs(stage - 1, window, dtype, options.batch or BATCH)
    able, wrong = runs(inputs, backward, options.peers)
    times = kernels.contest(able, options.rounds)
    least = floor(inputs, backward, *best)
    return harness.cell(
        name_of(stage, window),
        dtype,
        mode_of(backward),
        times.of,
        floor=round(least, 5),
        share_of_floor=round(least / times.of["ours"], 2),
        left_out={**wrong, **times.left_out},
    )


def name_of(stage: int, window: int) -> str:
    return f"window {window} stage {stage}"


def mode_of(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def jobs(options: argparse.Namespace, best: dict[str, Ceilings]) -> Iterator[Job]:
    for name in options.dtypes:
        dtype = kernels.DTYPES[name]
        for backward in (False, True):
            for window in map(int, options.windows):
                for stage in map(int, options.stages):
                    make = partial(measure, stage, window, dtype, backward, options, best[name])
                    yield Job(name_of(stage, window), dtype, mode_of(backward), make)


def main() -> None:
    parser = kernels.arguments(__doc__ or "", PEERS, 9, ["bfloat16", "float32"])
    split = partial(str.split, sep=",")
    parser.add_argument("--windows", type=split, default=["8", "16"])
    parser.add_argument("--stages", type=split, default=["1", "2", "3", "4"])
    options = parser.parse_args()
    if options.quick:
        options.dtypes, options.stages = options.dtypes[:1], options.stages[::2]
    kernels.start(options)
    best = {name: kernels.ceilings(kernels.DTYPES[name], options.quick) for name in options.dtypes}
    kernels.run(
        "window attention, ms",
        jobs(options, best),
        options,
        "floor",
        "share_of_floor",
        batch=options.batch or BATCH,
        ceilings={name: rate.as_json() for name, rate in best.items()},
    )


if __name__ == "__main__":
    main()
