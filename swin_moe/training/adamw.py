"""AdamW with bf16 moments, computed in fp32 and stored with stochastic rounding.

With beta2 = 0.999 the second moment changes by 0.1 % in an update, less than half of bf16's step:
with rounding to nearest it would never change. Stochastic rounding keeps its mean exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import AdamwFactors, adamw_

MOMENTS = ("exp_avg", "exp_avg_sq")
PAIRS = "moments"  # state key: both moments of an element in the bits of one fp32 number


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
    DeepSpeed can cut, move and swap it like any fp32 state. An update is one pass over memory, see
    ``ops/adamw.py``.

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
                hyper = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
                factors = AdamwFactors.of(int(state["step"]), **hyper)
                adamw_(parameter, parameter.grad, state[PAIRS], factors)


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
