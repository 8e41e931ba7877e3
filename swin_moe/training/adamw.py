"""AdamW with bf16 moments, computed in fp32 and stored with stochastic rounding.

With beta2 = 0.999 the second moment changes by 0.1 % in an update, less than half of bf16's step:
with rounding to nearest it would never change. Stochastic rounding keeps its mean exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
PAIRS = "moments"  # state key: both moments of an element in the bits of one fp32 number
_HIGH = -65536  # the upper half of an int32


def moment_views(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return 1-D views of an optimizer's moments of one parameter, by kind."""
    if PAIRS not in state:
        return {kind: state[kind].view(-1) for kind in MOMENTS}
    # The lower half of a little-endian number comes first.
    second, first = state[PAIRS].view(-1).view(torch.bfloat16).view(-1, 2).unbind(1)
    return {"exp_avg": first, "exp_avg_sq": second}


class PairedAdamW(torch.optim.Optimizer):
    """:class:`torch.optim.AdamW` with bf16 moments and fp32 weights.

    An fp32 tensor of the weights' shape holds both moments of each element in its bits, so that
    DeepSpeed can cut, move and swap it like any fp32 state. Updates are computed in fp32, in pieces
    that fit into the cache.

    The random numbers depend only on the update's number and the element's place: a resumed run
    repeats them, and no global generator is used.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if PAIRS not in state:
                    start_moments(state, parameter, 0, (PAIRS,))
                state["step"] += 1
                _update(parameter, state, group)


def start_moments(
    state: dict[str, Tensor], parameter: Tensor, updates: int, keys: tuple[str, ...]
) -> None:
    """Set the state of a parameter to zero moments, in place if there are any.

    DeepSpeed's swapper identifies moments by their tensors.

    Args:
        updates: number of updates made so far.
    """
    # Torch's fused AdamW keeps the number on the device; ours reads it on the host.
    device = "cpu" if PAIRS in keys else parameter.device
    state["step"] = torch.tensor(float(updates), device=device)
    for kind in keys:
        if kind in state:
            state[kind].zero_()
        else:
            state[kind] = torch.zeros_like(parameter)


def _update(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    step = int(state["step"])
    weights, gradient = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
    pairs = state[PAIRS].view(-1).view(torch.int32)
    size = 1 << 16 if pairs.device.type == "cpu" else 1 << 24  # fits the cache; fills a launch
    table = _table(size, pairs.device)
    generator = torch.Generator().manual_seed(step)
    pieces = -(-pairs.numel() // size)
    turns = torch.randint(1 << 16, (pieces, 2), generator=generator).tolist()
    for index, (turn, other) in enumerate(turns):
        part = slice(index * size, (index + 1) * size)
        noise = table[: pairs[part].numel()]
        _update_piece(
            weights[part], gradient[part], pairs[part], (noise + turn, noise + other), step, group
        )


def _update_piece(
    weights: Tensor,
    gradient: Tensor,
    pairs: Tensor,
    noise: tuple[Tensor, Tensor],
    step: int,
    group: dict[str, Any],
) -> None:
    """Update elements (https://arxiv.org/abs/1711.05101); pairs and noise are int32."""
    beta1, beta2 = group["betas"]
    first = pairs.bitwise_and(_HIGH).view(torch.float32)
    second = pairs.bitwise_left_shift(16).view(torch.float32)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weights.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    weights.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
    low = _rounded(second, noise[1]).bitwise_right_shift_(16)  # its sign bit is zero
    torch.bitwise_or(_rounded(first, noise[0]).bitwise_and_(_HIGH), low, out=pairs)


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    """Return bits whose upper halves are the fp32 values, rounded stochastically to bf16."""
    return values.view(torch.int32).add_(noise.bitwise_and_(0xFFFF))


@lru_cache(maxsize=4)
def _table(size: int, device: torch.device) -> Tensor:
    """Return random 16-bit numbers; a random offset makes new uniform numbers of them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1 << 16, (size,), generator=generator, dtype=torch.int32).to(device)
