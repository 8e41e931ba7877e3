"""What every model returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from ..moe import MoEResult, RoutingStats


class Outputs(NamedTuple):
    """Predictions, and the sums of the MoE layers where the model has any.

    Attributes:
        predictions: logits [B, num_classes], a list of maps, or a reconstructed image.
        aux_loss: scalar, sum of the layers' weighted balance losses; None in a dense model.
        routing: the layers' statistics, stacked: [layers, ...]; None in a dense model.
    """

    predictions: Any
    aux_loss: Tensor | None = None
    routing: RoutingStats | None = None

    @classmethod
    def of(cls, predictions: Any, results: Sequence[MoEResult]) -> Outputs:
        """Predictions with the results of the layers, in the order of their calls."""
        if not results:
            return cls(predictions)
        aux_loss = torch.stack([result.aux_loss for result in results]).sum()
        stacked = map(torch.stack, zip(*(result.stats for result in results), strict=True))
        return cls(predictions, aux_loss, RoutingStats(*stacked))


# torch.export saves the structure of a program's output.
for _kind in (Outputs, RoutingStats):
    _register_namedtuple(_kind, serialized_type_name=f"swin_moe.{_kind.__name__}")
