"""Agreement of all ranks in each update on non-finite values, a request to stop, and the loss.

It takes one small reduction per update, on the device. If any rank has a non-finite value, the
result makes the gradients of every rank NaN, so that every optimizer refuses the step. The result
travels to the host during the backward pass. The host reads it after the step, which has waited for
the backward pass anyway; it does not wait for the step's own work on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import World, all_reduce_
from .host_copy import HostCopy


class UpdateStatus(NamedTuple):
    """The status of an update, the same on every rank.

    Attributes:
        bad: place and rank of a non-finite value, "" if there was none; gradients are not checked.
        stop: 0, or whether a rank must stop: 1 = SIGINT alone, 2 = another signal.
        loss: the greatest of the ranks' mean losses.
    """

    bad: str
    stop: int
    loss: float


class Guard:
    """The status of one update, gathered over its micro-steps and the ranks.

    Args:
        layers: names of the MoE layers.
        stop_asked: returns this rank's part of ``stop``, such as
            :class:`~swin_moe.common.signals.StopSignal`.
    """

    def __init__(self, layers: list[str], world: World, stop_asked: Callable[[], int]) -> None:
        self.world, self._stop_asked = world, stop_asked
        self._places = [*(f"tokens at {layer}" for layer in layers), "loss"]
        # Non-finite values at each place, whether to stop, sum of the losses.
        self._signs = torch.zeros(len(self._places) + 2, device=world.device)
        self._losses = 0
        self._agreed: HostCopy | None = None

    def see(self, loss: Tensor, nonfinite_tokens: Tensor | None) -> None:
        """Add a micro-step.

        Args:
            loss: scalar.
            nonfinite_tokens: [layers], tokens with non-finite logits; None in a dense model.
        """
        loss = loss.detach().float()
        if nonfinite_tokens is not None:
            self._signs[:-3] += nonfinite_tokens
        self._signs[-3] += ~torch.isfinite(loss)
        self._signs[-1] += loss.nan_to_num(0.0, 0.0, 0.0)
        self._losses += 1

    def agree(self) -> Tensor:
        """Reduce over ranks, once per update, before its last backward pass.

        Returns:
            a scalar factor for the loss: 1, or NaN if any value was not finite.
        """
        signs = self._signs
        signs[:-2] = (signs[:-2] > 0).float() * (self.world.rank + 1)
        signs[-2] = float(self._stop_asked())
        signs[-1] /= max(self._losses, 1)
        all_reduce_(signs, "max")
        self._agreed = HostCopy(signs)
        return torch.where(signs[:-2].amax() > 0, torch.nan, 1.0)

    def read(self) -> UpdateStatus:
        """Return the result of :meth:`agree` and reset; the host waits for that result only.

        ``bad`` names the first layer with a non-finite value, which is nearest to the cause.
        """
        assert self._agreed is not None
        *culprits, stop, loss = self._agreed.tolist()
        self._agreed = None
        self._signs.zero_()
        self._losses = 0
        found = zip(self._places, culprits, strict=True)
        bad = next((f"{place} on rank {int(who) - 1}" for place, who in found if who > 0), "")
        return UpdateStatus(bad, int(stop), loss)


class SpikeDetector:
    """A detector of losses far above their running mean.

    Args:
        sigmas: standard deviations above the running mean that make a spike; 0 = never.
    """

    MEMORY = 100  # updates over which the running mean is taken
    WARM_UP = 50  # updates before the first check

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self._mean = self._variance = 0.0
        self._seen = 0

    def check(self, loss: float) -> str:
        """Return "mean ± deviation" if the loss is a spike, otherwise add it and return ""."""
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
