"""Checks ops at the size of a training: right, repeatable, and the same for each image alone.

The tests of the ops are small. A race, an index of 32 bits or a grid that is too large show at many
images only. Each op runs three times, once beside a busy second stream, in memory full of NaN; the
results must be equal to the bit. Attention must give each image what it gives it alone; the other
ops are compared with their references.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.first_contact.calls import Function, gradients, relative_error
from swin_moe import ops
from swin_moe.ops import RouteOptions
from tests.ops import adamw_cases, route_cases

# Stages of Swin V2 Base at 256 pixels: window, shift, side, heads.
STAGES = [(8, 4, 64, 4), (16, 8, 32, 8), (16, 0, 16, 16), (8, 0, 8, 32)]
TOKENS = 256  # of an image
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Problems = list[str]


def poison(device: str) -> None:
    """Leave NaN in the memory of the next tensors."""
    for size in (1 << 28, 1 << 24, 1 << 20) if device == "cuda" else (1 << 20,):
        torch.full((size,), torch.nan, device=device)


def busy(device: str) -> Callable[[], None]:
    """Start work on a second stream; return a function that waits for its end."""
    if device != "cuda":
        return lambda: None
    stream = torch.cuda.Stream()
    numbers = torch.rand(1 << 25, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(200):
            numbers.sin_()
    return stream.synchronize


def repeated(call: Callable[[], list[Tensor]], device: str) -> tuple[list[Tensor], bool]:
    """Return the results of a call, and whether three calls agree to the bit."""
    poison(device)
    first = call()
    poison(device)
    second = call()
    wait = busy(device)
    third = call()
    wait()
    same = all(
        torch.equal(a, b) for other in (second, third) for a, b in zip(first, other, strict=True)
    )
    return first, same


def window_attention(device: str, batch: int) -> Problems:
    problems: Problems = []
    for window, shift, side, heads in STAGES:
        for dtype in (torch.bfloat16, torch.float32):
            images = batch if dtype == torch.bfloat16 else max(batch // 4, 2)
            shape = (images, side, side, 3, heads, 32)
            qkv = torch.randn(shape, device=device).to(dtype)
            bias = 16 * torch.rand(heads, window**2, window**2, device=device)
            scale = torch.full((heads, 1, 1), 2.3, device=device)
            function = partial(ops.window_attention, window_size=window, shift_size=shift)
            found, same = repeated(partial(gradients, function, [qkv, bias, scale]), device)
            name = f"window {window}, side {side}, {images} images, {dtype}"
            if not same:
                problems.append(f"{name}: not the same each time")
            if not all(bool(tensor.isfinite().all()) for tensor in found):
                problems.append(f"{name}: not finite")
            for image in (0, images - 1):
                alone = gradients(function, [qkv[image : image + 1], bias, scale])
                if not all(torch.equal(a, b[image : image + 1]) for a, b in zip(alone[:2], found)):  # noqa: B905
                    problems.append(f"{name}: image {image} differs from itself alone")
    return problems


def moe_route(device: str, batch: int) -> Problems:
    problems: Problems = []
    tokens = batch * TOKENS
    for experts, top_k, groups in ((8, 1, 1), (32, 2, 1), (64, 2, batch)):
        capacity = -(-tokens * top_k * 5 // (4 * experts * groups))
        how = RouteOptions(
            top_k, False, top_k > 1, True, groups, capacity, load_sigma=1.0 / experts
        )
        inputs = route_cases.clear_inputs(tokens, experts, False, True, False)
        name = f"{tokens} tokens, {experts} experts, {groups} groups"
        try:
            route_cases.check(inputs, how, device)
        except AssertionError as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[0]}")
        moved = inputs.to(device)

        def call(moved: route_cases.Inputs = moved, how: RouteOptions = how) -> list[Tensor]:
            grad = route_cases.gradients(moved, ops.moe_route, how)
            return [*moved.route(ops.moe_route, how), grad]

        if not repeated(call, device)[1]:
            problems.append(f"{name}: not the same each time")
    return problems


def routed(device: str, batch: int, experts: int, top_k: int) -> ops.Route:
    """Route random tokens; the rows of the experts are packed."""
    logits = torch.randn(batch * TOKENS, experts, device=device)
    capacity = -(-len(logits) * top_k * 5 // (4 * experts))
    return ops.moe_route(logits, None, None, RouteOptions(top_k, capacity=capacity))


def moe_dispatch(device: str, batch: int) -> Problems:
    problems: Problems = []
    for experts, top_k, width in ((8, 1, 512), (32, 2, 384)):
        route = routed(device, batch, experts, top_k)
        maps = (route.source, route.destination)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(batch * TOKENS, width, device=device).to(dtype)
            y = torch.randn(len(route.source), width, device=device).to(dtype)
            pairs: dict[str, tuple[Function, Function, list[Tensor]]] = {
                "dispatch": (ops.moe_dispatch, ops.moe_dispatch_reference, [x]),
                "combine": (ops.moe_combine, ops.moe_combine_reference, [y, route.gate]),
            }
            for name, (function, reference, tensors) in pairs.items():
                mine = partial(_with_maps, function, maps)
                problems += _against(
                    f"{name}, {batch * TOKENS} tokens, {experts} experts, {dtype}",
                    partial(gradients, mine, tensors),
                    partial(gradients, partial(_with_maps, reference, maps), tensors),
                    dtype,
                    device,
                )
    return problems


def _with_maps(
    function: Callable[..., Tensor], maps: tuple[Tensor, Tensor], *tensors: Tensor
) -> Tensor:
    return function(*tensors, *maps)


def moe_experts(device: str, batch: int) -> Problems:
    problems: Problems = []
    for experts, width in ((8, 512), (32, 384)):
        rows = batch * TOKENS
        hidden = 4 * width if device == "cuda" else width
        uneven = torch.rand(experts).pow(2)
        used = (uneven / uneven.sum() * rows).long()
        used[1] = 0  # an expert without tokens
        used[0] += rows - used.sum()
        shapes = [(rows, width), (experts, hidden, width), (experts, hidden),
                  (experts, width, hidden), (experts, width)]  # fmt: skip
        tensors = [torch.randn(*shape, device=device) * shape[-1] ** -0.5 for shape in shapes]
        for dtype in (torch.bfloat16, torch.float32):
            function = partial(_with_used, ops.moe_experts, used.to(device))
            reference = partial(_with_used, ops.moe_experts_reference, used.to(device))
            cast = [tensor.to(dtype) for tensor in tensors]
            problems += _against(
                f"{rows} rows, {experts} experts, {dtype}",
                partial(gradients, function, cast),
                partial(gradients, reference, [tensor.double() for tensor in cast]),
                dtype,
                device,
            )
    return problems


def _with_used(
    function: Callable[..., Tensor], used: Tensor, rows: Tensor, *weights: Tensor
) -> Tensor:
    return function(rows, used, *weights)


def _against(
    name: str,
    call: Callable[[], list[Tensor]],
    reference: Callable[[], list[Tensor]],
    dtype: torch.dtype,
    device: str,
) -> Problems:
    found, same = repeated(call, device)
    problems = [] if same else [f"{name}: not the same each time"]
    errors = [relative_error(*pair) for pair in zip(found, reference(), strict=True)]
    if not max(errors) < TOLERANCE[dtype]:
        problems.append(f"{name}: errors {', '.join(f'{error:.1e}' for error in errors)}")
    return problems


def adamw_(device: str, batch: int) -> Problems:
    """Update more elements than a rank's part of a large model has; the last are no vector."""
    size = batch * TOKENS * (4096 if device == "cuda" else 64) + 3
    tensors = [tensor.to(device) for tensor in adamw_cases.inputs(size, torch.float32)]

    def update(function: Callable[..., None]) -> list[Tensor]:
        weights, gradient, pairs = (tensor.clone() for tensor in tensors)
        function(weights, gradient, pairs, adamw_cases.FACTORS)
        return [weights, pairs.view(torch.int32)]

    found, same = repeated(partial(update, ops.adamw_), device)
    problems = [] if same else [f"{size} elements: not the same each time"]
    expected = update(ops.adamw_reference_)
    if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        problems.append(f"{size} elements: differ from the reference")
    return problems


CHECKS = {
    "window_attention": window_attention,
    "moe_route": moe_route,
    "moe_dispatch": moe_dispatch,
    "moe_experts": moe_experts,
    "adamw_": adamw_,
}
