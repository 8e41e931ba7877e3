"""What all ranks must agree on in each update: bad numbers, the order to stop, a jump of the loss.

One small reduction an update, on the device. Its result makes the gradients of every rank NaN if
any rank met a bad number, so that the optimizer of each refuses the step, and it is read by the
host only after the step, which waits for the device anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import World, all_reduce_


class UpdateStatus(NamedTuple):
    """What an update was like; the same on every rank.

    Attributes:
        bad: what was not finite and where; empty if nothing was. A gradient is not looked at here.
        stop: whether a rank was asked to stop: 1 by SIGINT alone, 2 by another signal.
        loss: the greatest of the ranks' mean losses.
    """

    bad: str
    stop: int
    loss: float


class Guard:
    """Gathers the signs of one update over its micro-steps and the ranks.

    Args:
        layers: names of the MoE layers. stop_asked: whether this rank was asked to stop, as
            :class:`~swin_moe.common.signals.StopSignal` has it.
    """

    def __init__(self, layers: list[str], world: World, stop_asked: Callable[[], int]) -> None:
        self.world, self._stop_asked = world, stop_asked
        self._places = [*(f"tokens at {layer}" for layer in layers), "loss"]
        # Whether each place was bad, whether to stop, the sum of the losses.
        self._signs = torch.zeros(len(self._places) + 2, device=world.device)
        self._losses = 0

    def see(self, loss: Tensor, nonfinite_tokens: Tensor | None) -> None:
        """Take note of a micro-step: its loss, and [layers] tokens that were not finite."""
        loss = loss.detach().float()
        if nonfinite_tokens is not None:
            self._signs[:-3] += nonfinite_tokens
        self._signs[-3] += ~torch.isfinite(loss)
        self._signs[-1] += loss.nan_to_num(0.0, 0.0, 0.0)
        self._losses += 1

    def agree(self) -> Tensor:
        """Reduce over ranks; returns a scalar to multiply the loss with: 1, or NaN after bad ones.

        To be called once an update, before its last backward pass.
        """
        signs = self._signs
        signs[:-2] = (signs[:-2] > 0).float() * (self.world.rank + 1)
        signs[-2] = float(self._stop_asked())
        signs[-1] /= max(self._losses, 1)
        all_reduce_(signs, "max")
        return torch.where(signs[:-2].amax() > 0, torch.nan, 1.0)

    def read(self) -> UpdateStatus:
        """What :meth:`agree` found; synchronises the host and begins anew.

        The first layer that met a bad number is the nearest to the cause; later ones got it from
        there.
        """
        *culprits, stop, loss = self._signs.tolist()
        self._signs.zero_()
        self._losses = 0
        found = zip(self._places, culprits, strict=True)
        bad = next((f"{place} on rank {int(who) - 1}" for place, who in found if who > 0), "")
        return UpdateStatus(bad, int(stop), loss)


class SpikeDetector:
    """Finds losses far above what they were lately.

    Args:
        sigmas: how many standard deviations above the running mean; 0 = never.
    """

    MEMORY = 100  # updates that the running figures look back
    WARM_UP = 50  # updates before the first verdict

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self._mean = self._variance = 0.0
        self._seen = 0

    def check(self, loss: float) -> str:
        """What was usual, if the loss is a spike, else empty; a spike does not become usual."""
        deviation = math.sqrt(self._variance)
        bound = self._mean + self.sigmas * max(deviation, 1e-3 * abs(self._mean))
        if self.sigmas and self._seen >= self.WARM_UP and loss > bound:
            return f"{self._mean:.4g} ± {deviation:.2g}"
        self._seen += 1
        weight = max(1.0 / self._seen, 1.0 / self.MEMORY)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1.0 - weight) * (self._variance + weight * difference * difference)
        return ""
