"""Shifted-window attention: our op against how others compute it, from qkv map to output map.

Stages 1 to 4 of Swin V2 Tiny at 256 px, windows 8 and 16, batch 8, shifted where the window leaves
room. Contenders run in turn in one process under one allocator, with denormals flushed; figures are
medians in milliseconds. The floor is the larger of two: FLOPs over the measured rate of a matrix
product, and bytes (q, k, v and output, their gradients) over the measured rate of a copy.

    python -m benchmarks.window_attention [--json PATH] [--quick] [--rounds N]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import attention_peers, harness
from benchmarks.attention_peers import Inputs
from swin_moe import ops
from swin_moe.ops.window_reference import Windows

BATCH, HEAD_DIM, SIDE = 8, 32, 64
Contender = Callable[[Inputs], Tensor]


def ours(inputs: Inputs) -> Tensor:
    return ops.window_attention(
        inputs.qkv,
        inputs.bias,
        inputs.scale,
        window_size=inputs.window_size,
        shift_size=inputs.shift_size,
    )


def make_inputs(stage: int, window: int, dtype: torch.dtype, device: str) -> Inputs:
    """Random tensors of a stage; logits as at the start of training."""
    side, heads = SIDE >> stage, 3 << stage
    window = min(window, side)
    shift = window // 2 if side > window else 0
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, side, side, 3, heads, HEAD_DIM, device=device).to(dtype)
    bias = 16 * torch.rand(heads, window**2, window**2, device=device)
    scale = torch.full((heads, 1, 1), 2.3026, device=device)
    windows = Windows((window, window), (shift, shift))
    mask = windows.mask(side, side, qkv)
    return Inputs(qkv, bias, scale, mask, window, shift)


def contenders(backward: bool) -> dict[str, Contender]:
    """Everyone, compiled anew: dynamo would otherwise turn to dynamic shapes."""
    torch._dynamo.reset()
    found: dict[str, Contender] = {
        "timm": attention_peers.timm_attention,
        "timm compiled": torch.compile(attention_peers.timm_attention),
        "sdpa": attention_peers.sdpa_attention,
        "sdpa compiled": torch.compile(attention_peers.sdpa_attention),
    }
    if torch.cuda.is_available() or not backward:  # flex_attention has no backward on a CPU
        found["flex compiled"] = attention_peers.flex_attention
    return found


def forward(contender: Contender, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return contender(inputs)


def forward_backward(contender: Contender, inputs: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = (inputs.qkv, inputs.bias, inputs.scale)
    return torch.autograd.grad(contender(inputs), leaves, grad)


def runs(inputs: Inputs, backward: bool) -> dict[str, Callable[[], object]]:
    """The contenders that compute the right output, ready to be timed."""
    expected = forward(ours, inputs).float()
    if backward:
        for leaf in (inputs.qkv, inputs.bias, inputs.scale):
            leaf.requires_grad_()
    grad = torch.randn_like(expected).to(inputs.qkv.dtype)
    tolerance = 1e-3 if inputs.qkv.dtype == torch.float32 else 0.5  # bf16 softmax errs by 0.2
    result: dict[str, Callable[[], object]] = {}
    for name, contender in (contenders(backward) | {"ours": ours}).items():
        try:
            error = (forward(contender, inputs).float() - expected).abs().max().item()
        except Exception as problem:
            print(f"  {name} does not run here: {str(problem).strip().splitlines()[0][:100]}")
            continue
        if error > tolerance:
            print(f"  {name} is wrong by {error:.3f} and is left out")
        elif backward:
            result[name] = partial(forward_backward, contender, inputs, grad)
        else:
            result[name] = partial(forward, contender, inputs)
    return result


def rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product into a kept buffer, bytes/s of a copy of 256 MB."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(64 << 20, device=device)
    target = torch.zeros_like(source)
    times = harness.interleaved(
        {
            "product": lambda: torch.mm(a, b, out=product),
            "copy": lambda: target.copy_(source),
        },
        rounds=9,
    )
    return 2 * 2048**3 / times["product"] * 1e3, 2 * 4 * source.numel() / times["copy"] * 1e3


def floor(inputs: Inputs, backward: bool, flops_rate: float, bytes_rate: float) -> float:
    """Milliseconds below which no implementation gets that recomputes the probabilities."""
    B, H, W, _, heads, d = inputs.qkv.shape
    tokens, N = B * H * W, inputs.window_size**2
    products = 7 if backward else 2
    flops = products * 2 * tokens * N * heads * d
    maps = (4 + 8) if backward else 4  # q, k, v, out; then those, grad_out and three gradients
    moved = maps * tokens * heads * d * inputs.qkv.element_size()
    return 1e3 * max(flops / flops_rate, moved / bytes_rate)


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    harness.tuned_process()
    device = harness.device()
    dtypes = [torch.bfloat16] if options.quick else [torch.bfloat16, torch.float32]
    stages = [0, 2] if options.quick else [0, 1, 2, 3]
    cells, rows = [], []
    for dtype in dtypes:
        measured = rates(dtype, device)
        for backward in (False, True):
            for window in (8, 16):
                for stage in stages:
                    inputs = make_inputs(stage, window, dtype, device)
                    times = harness.interleaved(runs(inputs, backward), options.rounds)
                    least = floor(inputs, backward, *measured)
                    mode = "forward+backward" if backward else "forward"
                    cell = harness.cell(
                        f"window {window} stage {stage + 1}",
                        dtype,
                        mode,
                        times,
                        floor=round(least, 3),
                        share_of_floor=round(least / times["ours"], 2),
                    )
                    cells.append(cell)
                    rows.append(harness.row(cell, "floor", "share_of_floor"))
                    print("  ".join(rows[-1]), flush=True)
    harness.report("window attention, ms", harness.columns("floor", "share"), rows)
    harness.summary(cells)
    harness.write_json(options.json, cells)


if __name__ == "__main__":
    main()
