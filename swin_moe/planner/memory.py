"""Computes the memory of a rank by kind, at the peak of a training step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np

from .states import States
from .trace import Trace


@dataclass(frozen=True)
class Memory:
    """The bytes of a rank at the peak, by kind.

    Attributes:
        host: in the host's memory.
        passes: of the device's bytes, the peak of the forward and backward pass above weights,
            optimizer and margin.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    all_to_all: int
    update: int
    margin: int
    host: int
    passes: int

    @property
    def total(self) -> int:
        """The bytes on the device."""
        kinds = [field.name for field in fields(self) if field.name not in ("host", "passes")]
        return sum(getattr(self, kind) for kind in kinds)

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of each kind, on device and host."""
        return {kind: size for kind, size in asdict(self).items() if kind != "passes"}


def memory(
    traced: Trace,
    held: States,
    *,
    images: int,
    accumulates: bool,
    gradient_width: int,
    expert_scale: float = 1.0,
    offloaded_per_image: int = 0,
    margin: int = 0,
) -> Memory:
    """Return the memory at the peak of a step, which is in the passes or in the update.

    Args:
        traced: activations of the passes.
        held: weights, gradients, optimizer and buckets.
        images: of a micro-batch.
        accumulates: several micro-batches make an update.
        gradient_width: bytes of a gradient's element during the passes.
        expert_scale: this rank's experts over the traced ones.
        offloaded_per_image: bytes of block inputs that the host keeps.
        margin: bytes that stay free.
    """
    live = np.maximum(traced.live.at(images) - offloaded_per_image * images, 0)
    away = traced.travelling.at(images)
    elements = traced.dense_grads + traced.expert_grads * expert_scale
    if not held.full_gradients:
        gradients = np.full_like(live, held.gradients if accumulates or held.between else 0)
    elif accumulates:
        gradients = np.full_like(live, gradient_width * float(elements[-1]))
    else:
        gradients = gradient_width * elements
    backward = np.arange(len(live)) >= traced.forward_events
    # ZeRO-3 holds its buckets throughout, ZeRO-1 and 2 from the first gradient on.
    buckets = held.buckets * (backward | accumulates | (held.between > 0))
    buckets = buckets + held.flush * (elements > held.bucket)
    during = live + gradients + buckets + held.between
    worst = int(during.argmax())
    in_update = held.gradients + held.between + held.update > during[worst]
    return Memory(
        weights=held.weights,
        gradients=held.gradients if in_update else int(gradients[worst]),
        optimizer=held.optimizer,
        buckets=held.between + (0 if in_update else int(buckets[worst])),
        activations=0 if in_update else int(live[worst] - away[worst]),
        all_to_all=0 if in_update else int(away[worst]),
        update=held.update if in_update else 0,
        margin=margin,
        host=held.host,
        passes=int(during[worst]),
    )
