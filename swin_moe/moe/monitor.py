"""The MoE layers of any model during training: statistics, warnings, and the experts' bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .health import RouterWatch
from .layer import MoELayer
from .meter import AssignmentCounter, LayerTotals, RouterMeter
from .plan import RoutingStats


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers by the name of their block, such as ``layers.2.blocks.1``, in their order."""
    return {
        name.removesuffix(".mlp"): module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
    }


def num_experts(model: nn.Module) -> int:
    """Experts of each MoE layer over all ranks; 1 without such layers."""
    return next((layer.moe.num_experts for layer in moe_layers(model).values()), 1)


def update_expert_bias(model: nn.Module, tokens_per_expert: Tensor) -> None:
    """Move the bias of each expert towards an even load, once per optimizer step.

    Args:
        tokens_per_expert: [layers, E] assignments of all ranks in that step.
    """
    for layer, counts in zip(moe_layers(model).values(), tokens_per_expert, strict=True):
        if layer.choice_bias is not None:
            layer.choice_bias.update(counts)


class RouterMonitor:
    """Follows the routers of a model from one update to the next.

    Attributes:
        names: of the layers.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        layers = moe_layers(model)
        configs = [layer.moe for layer in layers.values()]
        self.names = list(layers)
        self._model = model
        self._meter = RouterMeter(len(layers), num_experts(model), device)
        self._watch = RouterWatch(self.names, configs)
        # Only a model with such a bias pays for the reduction of each update's counts.
        biased = any(moe.expert_bias_update_rate > 0 for moe in configs)
        self._assignments = AssignmentCounter() if biased else None

    def update(self, routing: RoutingStats) -> None:
        """Add the statistics of a micro-step, stacked over the layers."""
        self._meter.update(routing)
        if self._assignments is not None:
            self._assignments.update(routing)

    def after_update(self, made: bool) -> None:
        """Move the experts' bias; every rank must call it after each optimizer step.

        Args:
            made: False if the update was left out: its tokens then change no bias.
        """
        if self._assignments is not None:
            counts = self._assignments.read()
            if made:
                update_expert_bias(self._model, counts)

    def read(self) -> list[LayerTotals]:
        """Return the totals of each layer since the last call; every rank must call it."""
        return self._meter.read()

    def record(self, totals: list[LayerTotals]) -> dict[str, Any]:
        """Flat keys ``moe/<name>/…`` for the log."""
        pairs = zip(self.names, totals, strict=True)
        return {key: value for name, layer in pairs for key, value in layer.record(name).items()}

    def warnings(self, totals: list[LayerTotals]) -> list[str]:
        """One line for each layer that needs help; a warning is repeated rarely."""
        return self._watch.check(totals)
