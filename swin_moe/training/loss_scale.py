"""The loss scale of fp16: it keeps small gradients from becoming zero."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# torch.amp.GradScaler's figures.
INITIAL = 2.0**16
WINDOW = 2000  # updates made in a row, after which the scale doubles
LEAST = 1.0


class LossScale:
    """A factor of the loss that doubles after ``WINDOW`` updates and halves at an overflow.

    It takes the place of DeepSpeed's own loss scaler, whose interface it has. DeepSpeed changes its
    scale before it divides the gradients by it, so that an update at which the scale grows gets
    half of its gradients. This one changes between updates only.

    Attributes:
        value: the factor.
        made: updates made since the last change.
    """

    dynamic = True

    def __init__(self) -> None:
        self.value = INITIAL
        self.made = 0

    def count(self) -> None:
        """Count an update that was made."""
        self.made += 1
        if self.made >= WINDOW:
            self.value, self.made = 2.0 * self.value, 0

    def lower(self) -> bool:
        """Halve the scale after an overflow; return False if it is as low as it may be."""
        if self.value <= LEAST:
            return False
        self.value, self.made = max(self.value / 2.0, LEAST), 0
        return True

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint; it is the same on every rank."""
        return {"value": self.value, "made": self.made}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.made = float(state["value"]), int(state["made"])

    # ----------------------------------------------------------------------------------------
    # DeepSpeed's interface

    @property
    def cur_scale(self) -> float:
        return self.value

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.value

    def update_scale(self, overflow: bool) -> None:
        """Do nothing: the engine changes the scale after the update."""
