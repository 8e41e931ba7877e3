"""Calls every op once at a small shape, forward and backward, and compares it with fp64.

    python -m benchmarks.first_contact.calls [--device cuda] [--quick]

The step ``library`` looks whether the kernels run at all; the step ``sanitizer`` runs this program
under compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.first_contact import options as common
from swin_moe import ops
from swin_moe.ops import RouteOptions
from tests.ops import adamw_cases

TOLERANCE = 0.05  # of the norm, in bf16
Function = Callable[..., Tensor]


def gradients(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of all tensors; the output is also its gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm().item()
    return (actual.double() - exact.double()).norm().item() / max(norm, 1e-30)


def compare(function: Function, tensors: list[Tensor]) -> float:
    """Return the worst relative error of a call compared with fp64, which has no kernels."""
    mine = gradients(function, tensors)
    exact = gradients(function, [tensor.double() for tensor in tensors])
    return max(relative_error(*pair) for pair in zip(mine, exact, strict=True))


def attention(device: str) -> float:
    """Call shifted windows of 8 and 16 on a map that they do not divide, in each kernel dtype."""
    worst = 0.0
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device == "cuda")
    for dtype in dtypes:
        for window in (8, 16):
            qkv = torch.randn(1, 20, 24, 3, 2, 32, device=device).to(dtype)
            bias = torch.rand(2, window**2, window**2, device=device)
            scale = torch.full((2, 1, 1), 2.3, device=device)

            def function(*tensors: Tensor, window: int = window) -> Tensor:
                shift = window // 2
                return ops.window_attention(*tensors, window_size=window, shift_size=shift)

            worst = max(worst, compare(function, [qkv, bias, scale]))
    return worst


def moe(device: str) -> float:
    """Call the ops of a layer one after another: packed and padded rows, top-1 and top-2."""
    worst, tokens, width, experts = 0.0, 96, 32, 4
    for dtype in (torch.float32, torch.bfloat16):
        for top_k, padded in ((1, False), (2, True)):
            how = RouteOptions(
                top_k, top_k > 1, top_k > 1, True, capacity=40, padded=padded, load_sigma=0.25
            )
            logits = torch.randn(tokens, experts, device=device)
            route = ops.moe_route(logits, None, None, how)
            shapes = [(experts, 64, width), (experts, 64), (experts, width, 64), (experts, width)]
            weights = [0.2 * torch.randn(*shape, device=device) for shape in shapes]
            x = torch.randn(tokens, width, device=device)

            def layer(x: Tensor, *weights: Tensor, route: ops.Route = route) -> Tensor:
                rows = ops.moe_dispatch(x, route.source, route.destination)
                stride = 40 if len(route.source) == 4 * 40 else 0
                rows = ops.moe_experts(rows, route.used, *weights, stride=stride)
                return ops.moe_combine(rows, route.gate, route.source, route.destination)

            tensors = [tensor.to(dtype) for tensor in (x, *weights)]
            worst = max(worst, compare(layer, tensors), routing(logits, how))
    return worst


def routing(logits: Tensor, how: RouteOptions) -> float:
    """Return the gates, sums and scalars that have a gradient."""

    def function(logits: Tensor) -> Tensor:
        route = ops.moe_route(logits, None, None, how)
        return torch.cat([route.gate.flatten(), route.sums.flatten(), route.scalars[:1]])

    return compare(function, [logits])


def adamw(device: str) -> float:
    """Update some elements, in vectors and one by one, and compare with the reference."""
    worst = 0.0
    for first in (0, 1):
        tensors = [t[first:].to(device) for t in adamw_cases.inputs(1003, torch.float32)]
        mine, exact = ([tensor.clone() for tensor in tensors] for _ in range(2))
        ops.adamw_(mine[0], mine[1], mine[2], adamw_cases.FACTORS)
        ops.adamw_reference_(exact[0], exact[1], exact[2], adamw_cases.FACTORS)
        worst = max(worst, *(relative_error(*pair) for pair in zip(mine, exact, strict=True)))
    return worst


def check(device: str) -> dict[str, float]:
    """Return the worst error of each kind of op.

    Raises:
        RuntimeError: one is too large, or not a number.
    """
    torch.manual_seed(0)
    errors = {"window_attention": attention(device), "moe": moe(device), "adamw": adamw(device)}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    if wrong:
        raise RuntimeError(f"wrong results: {wrong}, of the norm; {TOLERANCE} is allowed")
    return errors


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    ops.trust_kernels()
    errors = check(options.device)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    common.write(options, errors=errors)


if __name__ == "__main__":
    main()
