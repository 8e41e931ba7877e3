"""Mixture-of-Experts layers: plan, router, routing modes, balance, exchange, experts, layer."""

from .backends import build as build_moe
from .health import RouterWatch, lost_gate
from .layer import MoELayer, MoEResult
from .meter import ChoiceCounter, LayerTotals, RouterMeter
from .plan import Routing, RoutingPlan, RoutingStats
from .tuning import choose_overlap

__all__ = [
    "ChoiceCounter",
    "LayerTotals",
    "MoELayer",
    "MoEResult",
    "RouterMeter",
    "RouterWatch",
    "Routing",
    "RoutingPlan",
    "RoutingStats",
    "build_moe",
    "choose_overlap",
    "lost_gate",
]
