"""Mixture-of-Experts layers: plan, router, routing modes, balance, exchange, experts, layer."""

from .build import build_moe
from .health import RouterWatch, lost_gate
from .layer import MoELayer, MoEResult
from .meter import AssignmentCounter, LayerTotals, RouterMeter
from .plan import Routing, RoutingPlan, RoutingStats
from .tuning import choose_overlap

__all__ = [
    "AssignmentCounter",
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
