"""The calls by which the kernels of each op are tried and timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library
from ..adamw import AdamwFactors, adamw_, adamw_reference_
from ..moe_dispatch import moe_combine, moe_dispatch
from ..moe_experts import moe_experts
from ..moe_route import moe_route
from ..route_reference import RouteOptions, moe_route_reference
from ..signature import Choice
from ..window_attention import KERNEL_HEAD_DIMS, window_attention
from .checks import Case, against, alone, compare, measure, repeat, results

Shape = tuple[int, ...]
ELEMENTS_PAST_32_BITS = (1 << 31) + 1
SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}  # of a timed attention
HEADS = {"cpu": 3, "cuda": 8}
ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}  # of a timed update
WIDTH = {"cpu": 96, "cuda": 512}
TOKENS = {"cpu": 2048, "cuda": 1 << 15}  # of a timed MoE op


def _random(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


# --------------------------------------------------------------------------------------------
# Window attention


def try_attention(device: str, dtype: torch.dtype, shape: Shape) -> Choice:
    """Try windows of a GPU's shape (height, width, head_dim), on a CPU of many."""
    height, width, head_dim = shape or (8, 8, 32)
    heads = HEADS[device]
    for window in dict.fromkeys([(height, width), (7, 7)]):
        for case in _attention_cases(device, dtype, window, 3, head_dim):
            compare(case)
    if device == "cpu":
        for other in KERNEL_HEAD_DIMS:
            compare(_attention(device, dtype, (5, 6), (13, 11), 2, other, 2, shift=(2, 3)))
        compare(_attention(device, dtype, (16, 16), (20, 32), 2, head_dim, 1, shift=(8, 8)))
    window = (height, width)
    half = (height // 2, width // 2)
    timed = _attention(device, dtype, window, _side(window), heads, head_dim, None, shift=half)
    repeat(timed, device)
    _each_image(timed)
    if device == "cuda":
        _past_32_bits(dtype, window, heads, head_dim)
    return measure(timed, device)


def try_amx(device: str, dtype: torch.dtype, shape: Shape) -> Choice:
    """Try the kernels for AMX tiles, and time them against those for AVX-512."""
    _library.allow_amx(True)
    try:
        found = try_attention(device, dtype, shape)
        case = _attention(device, dtype, (8, 8), (32, 32), 3, 32, None, shift=(4, 4))

        def others() -> None:
            _library.allow_amx(False)
            results(case)
            _library.allow_amx(True)

        return against(case, others, device) if found.right else found
    finally:
        _library.allow_amx(False)


def _attention_cases(
    device: str, dtype: torch.dtype, window: Shape, heads: int, head_dim: int
) -> list[Case]:
    height, width = window
    even, padded = (2 * height, 2 * width), (2 * height - 1, height + width + 1)
    shift = (height // 2, width // 2)
    size = (heads, head_dim)
    return [
        _attention(device, dtype, window, even, *size, 2),
        _attention(device, dtype, window, padded, *size, 2, shift=shift),
        _attention(device, dtype, window, padded, *size, 1, shift=shift, dropout=0.2),
        _attention(device, dtype, window, even, *size, 1, cosine=False),
        _attention(device, dtype, window, even, *size, 1, shift=shift, offset=1),
    ]


def _side(window: Shape) -> Shape:
    """Return the map of a timed call: 4 × 4 windows, or fewer large ones."""
    count = 4 if window[0] * window[1] <= 256 else 2
    return count * window[0], count * window[1]


def _attention(
    device: str,
    dtype: torch.dtype,
    window: Shape,
    size: Shape,
    heads: int,
    head_dim: int,
    batch: int | None,
    *,
    shift: Shape = (0, 0),
    cosine: bool = True,
    dropout: float = 0.0,
    offset: int = 0,
) -> Case:
    """Return a call.

    Args:
        batch: None = as many images as fill a timed call.
        offset: elements by which the storage is misaligned.
    """
    tokens = window[0] * window[1]
    if batch is None:
        scores = size[0] * size[1] * tokens * heads
        batch = max(2, SCORES[device] // scores)
    shape = (batch, *size, 3, heads, head_dim)
    numbers = _random(device, dtype, batch * size[0] * size[1] * 3 * heads * head_dim + offset)
    qkv = numbers[offset:].view(shape)
    bias = 16 * _random(device, torch.float32, heads, tokens, tokens).abs().clamp(max=1)
    scale = torch.linspace(2.0, 2.3, heads, device=device)
    scale = scale if cosine else 0.1 * scale

    def function(qkv: Tensor, bias: Tensor, scale: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(5)  # for the dropout
        out = window_attention(
            qkv, bias, scale, window_size=(window[0], window[1]), shift_size=(shift[0], shift[1]),
            cosine=cosine, dropout_p=dropout,
        )  # fmt: skip
        return {"the output": out}

    words = [f"window {window[0]}×{window[1]}", f"{batch} images of {size[0]}×{size[1]}"]
    flags = {"shifted": any(shift), "not cosine": not cosine, "misaligned": offset}
    words += [word for word, present in flags.items() if present]
    words += [f"dropout {dropout:g}"] * (dropout > 0)
    leaves = {"qkv": qkv, "bias": bias, "scale": scale.view(-1, 1, 1)}
    return Case(", ".join(words), function, leaves)


def _each_image(case: Case) -> None:
    def pick(case: Case, image: int) -> Case:
        leaves = {**case.leaves, "qkv": case.leaves["qkv"][image : image + 1]}
        return case._replace(leaves=leaves)

    # The gradients of all images get their weights from one draw: those of one image differ.
    images = case.leaves["qkv"].shape[0]
    alone(_even_weights(case), images, pick, ["the output", "the gradient of qkv"])


def _even_weights(case: Case) -> Case:
    """Return the case with an output whose sum depends on each element, for a gradient of ones."""

    def function(*tensors: Tensor) -> dict[str, Tensor]:
        out = case.function(*tensors)["the output"]
        return {"the output": out.detach(), "the square": out.float().square().sum()}

    return case._replace(function=function)


def _past_32_bits(dtype: torch.dtype, window: Shape, heads: int, head_dim: int) -> None:
    """Check a batch of more than 2³¹ elements, if the GPU has room for it."""
    size = _side(window)
    image = 3 * size[0] * size[1] * heads * head_dim
    images = ELEMENTS_PAST_32_BITS // image + 1
    needed = 8 * images * image * dtype.itemsize  # with fp32 results and gradients
    if torch.cuda.mem_get_info()[0] < needed:
        return
    case = _attention("cuda", dtype, window, size, heads, head_dim, 1)
    few = case.leaves["qkv"]
    many = few.expand(images, *few.shape[1:]).contiguous()
    _each_image(case._replace(leaves={**case.leaves, "qkv": many}))
    torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------
# Mixture of experts


def _route(tokens: int, experts: int) -> Tensor:
    """Return logits [T, E] of which scores are equal, or so far apart that no rounding swaps them.

    They are 16 rows, drawn at random: permutations of equal steps, each of another size.
    """
    generator = torch.Generator().manual_seed(0)
    steps = (torch.arange(experts) - (experts - 1) / 2) * min(0.25, 8 / experts)
    order = torch.stack([torch.randperm(experts, generator=generator) for _ in range(16)])
    rows = steps[order] * (1 + torch.arange(16)[:, None] / 32)
    return rows[torch.randint(16, (tokens,), generator=generator)]


def try_route(device: str, dtype: torch.dtype, shape: Shape) -> Choice:
    """Try the routing to several numbers of experts."""
    for experts, top_k in ((8, 1), (8, 2), (5, 3), (33, 2), (128, 1)):
        for case in _route_cases(device, experts, top_k):
            compare(case)
    timed = _routing(device, TOKENS[device], 8, _timed_route(device, 8, 1))
    repeat(timed, device)
    compare(timed)
    return measure(timed, device)


def _timed_route(device: str, experts: int, top_k: int) -> RouteOptions:
    capacity = -(-TOKENS[device] * top_k * 5 // (4 * experts))
    return RouteOptions(top_k, prioritized=True, capacity=capacity, load_sigma=1 / experts)


def _route_cases(device: str, experts: int, top_k: int) -> list[Case]:
    tight = max(1, 301 * top_k // (2 * experts))
    options = [
        RouteOptions(top_k),
        RouteOptions(top_k, prioritized=True, capacity=tight, load_sigma=1 / experts),
        RouteOptions(top_k, sigmoid=True, normalize=True, groups=7, capacity=tight, padded=True),
    ]
    return [_routing(device, 301, experts, how) for how in options]


def _routing(device: str, tokens: int, experts: int, options: RouteOptions) -> Case:
    logits = _route(tokens, experts)
    logits[3, 0] = torch.nan  # dropped, and counted
    logits, noise = logits.to(device), torch.zeros(tokens, experts, device=device)
    bias = torch.zeros(experts, device=device)

    def function(logits: Tensor, noise: Tensor, bias: Tensor) -> dict[str, Tensor]:
        exact = logits.dtype == torch.float64
        how = moe_route_reference if exact else moe_route
        found = how(logits, noise, bias, options)._asdict()
        # Only the first scalar has a gradient.
        found["scalars"] = torch.cat((found["scalars"][:1], found["scalars"][1:].detach()))
        return found

    kind = "sigmoid" if options.sigmoid else "softmax"
    name = f"{tokens} tokens, {experts} experts, top-{options.top_k}, {kind}"
    return Case(name, function, {"logits": logits}, (noise, bias))


def _maps(device: str, tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return source, destination and rows per expert of a route that drops some assignments."""
    logits = _random("cpu", torch.float32, tokens, experts, seed=3)
    capacity = max(1, tokens * top_k // experts)
    route = moe_route_reference(logits, None, None, RouteOptions(top_k, capacity=capacity))
    return tuple(x.to(device) for x in (route.source, route.destination, route.used))  # type: ignore[return-value]


def try_dispatch(device: str, dtype: torch.dtype, shape: Shape) -> Choice:
    """Try the dispatch of rows of several widths."""
    return _try_rows(_dispatch, device, dtype)


def try_combine(device: str, dtype: torch.dtype, shape: Shape) -> Choice:
    """Try the combination of rows of several widths."""
    return _try_rows(_combine, device, dtype)


def _try_rows(make: Callable[..., Case], device: str, dtype: torch.dtype) -> Choice:
    for tokens, top_k, width in ((257, 2, 96), (1, 1, 512), (65, 3, 33)):
        compare(make(device, dtype, tokens, top_k, width))
        compare(make(device, dtype, tokens, top_k, width, offset=1))
    timed = make(device, dtype, TOKENS[device], 2, WIDTH[device])
    repeat(timed, device)
    compare(timed)
    return measure(timed, device)


def _rows(device: str, dtype: torch.dtype, rows: int, width: int, offset: int) -> Tensor:
    return _random(device, dtype, rows * width + offset)[offset:].view(rows, width)


def _dispatch(
    device: str, dtype: torch.dtype, tokens: int, top_k: int, width: int, offset: int = 0
) -> Case:
    source, destination, _ = _maps(device, tokens, 8, top_k)

    def function(x: Tensor) -> dict[str, Tensor]:
        return {"the rows": moe_dispatch(x, source, destination)}

    name = f"{tokens} tokens of width {width}, top-{top_k}" + ", misaligned" * (offset > 0)
    return Case(name, function, {"x": _rows(device, dtype, tokens, width, offset)})


def _combine(
    device: str, dtype: torch.dtype, tokens: int, top_k: int, width: int, offset: int = 0
) -> Case:
    source, destination, _ = _maps(device, tokens, 8, top_k)
    gate = _random(device, torch.float32, tokens, top_k, seed=4).sigmoid()

    def function(y: Tensor, gate: Tensor) -> dict[str, Tensor]:
        return {"the tokens": moe_combine(y, gate, source, destination)}

    y = _rows(device, dtype, len(source), width, offset)
    name = f"{tokens} tokens of width {width}, top-{top_k}" + ", misaligned" * (offset > 0)
    return Case(name, function, {"y": y, "gate": gate})


def try_experts(device: str, dtype: torch.dtype, shape: Shape) -> Choice:
    """Try experts with uneven, empty and padded rows."""
    for stride, dropout, bias in ((0, 0.0, True), (80, 0.0, False), (0, 0.3, True)):
        compare(_experts(device, dtype, 5, 64, 32, 300, stride, dropout, bias))
    width = WIDTH[device]
    timed = _experts(device, dtype, 8, 2 * width, width, TOKENS[device], 0, 0.0, True)
    repeat(timed, device)
    compare(timed)
    return measure(timed, device)


def _experts(
    device: str,
    dtype: torch.dtype,
    experts: int,
    hidden: int,
    width: int,
    rows: int,
    stride: int,
    dropout: float,
    bias: bool,
) -> Case:
    """Return a call; with several experts, the second one has no rows."""
    used = torch.full((experts,), rows // max(experts - 1, 1))
    if experts > 1:
        used[1] = 0
    if stride:
        used, rows = used.clamp(max=stride), experts * stride
    taken = torch.zeros(rows, dtype=torch.bool)
    start = 0
    for count in used.tolist():
        taken[start : start + count] = True
        start += stride or count
    taken, used = taken.to(device), used.to(device)
    shapes = {"fc1.weight": (experts, hidden, width), "fc1.bias": (experts, hidden),
              "fc2.weight": (experts, width, hidden), "fc2.bias": (experts, width)}  # fmt: skip
    leaves = {"rows": _random(device, dtype, rows, width)}
    for name, shape in shapes.items():
        if bias or name != "fc2.bias":
            leaves[name] = _random(device, dtype, *shape, seed=1) * shape[-1] ** -0.5

    def function(
        rows: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        torch.manual_seed(5)  # for the dropout
        # Results and gradients of empty rows are undefined.
        rows = torch.where(taken[:, None], rows, 0.0)
        weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        out = moe_experts(rows, used, *weights, stride=stride, dropout_p=dropout)
        return {"the rows": torch.where(taken[:, None], out, 0.0)}

    name = f"{rows} rows, {experts} experts" + f", padded to {stride}" * (stride > 0)
    return Case(name + f", dropout {dropout:g}" * (dropout > 0), function, leaves)


# --------------------------------------------------------------------------------------------
# The optimizer


def try_adamw(device: str, dtype: torch.dtype, shape: Shape) -> Choice:
    """Try the update of vectors and single elements, with both dtypes of gradients."""
    compare(_adamw(device, 4097, torch.float32))
    compare(_adamw(device, 4097, torch.bfloat16, offset=1))
    timed = _adamw(device, ELEMENTS[device], torch.float32)
    repeat(timed, device)
    return measure(timed, device)


def _adamw(device: str, count: int, gradient: torch.dtype, offset: int = 0) -> Case:
    """Return an update; its random bits are the same in fp64, and so is its reference."""
    weights = _random(device, torch.float32, count + offset)[offset:]
    grad = _random(device, gradient, count + offset, seed=1)[offset:]
    moments = _random(device, torch.bfloat16, count, 2, seed=2).abs()
    factors = AdamwFactors.of(7, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)

    def function(weights: Tensor, grad: Tensor) -> dict[str, Tensor]:
        exact = weights.dtype == torch.float64
        update = adamw_reference_ if exact else adamw_
        new = weights.detach().to(torch.float32, copy=True)
        pairs = moments.view(torch.float32).flatten().clone()
        update(new, grad.to(gradient), pairs, factors)
        second, first = pairs.view(torch.bfloat16).view(-1, 2).unbind(1)
        return {"the weights": new, "the first moment": first, "the second moment": second}

    return Case(
        f"{count} elements, gradient in {gradient}", function, {"weights": weights}, (grad,)
    )


TRIALS: dict[str, Callable[[str, torch.dtype, Shape], Choice]] = {
    "adamw_": try_adamw,
    "window_attention": try_attention,
    "window_attention_amx": try_amx,
    "moe_route": try_route,
    "moe_dispatch": try_dispatch,
    "moe_combine": try_combine,
    "moe_experts": try_experts,
}
