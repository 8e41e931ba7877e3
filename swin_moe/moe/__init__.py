"""Mixture-of-Experts layers: plan, router, routing modes, balance, exchange, experts, layer."""

from .backends import build as build_moe
from .layer import MoELayer, MoEResult
from .plan import RoutingPlan, RoutingStats
from .tuning import choose_overlap

__all__ = ["MoELayer", "MoEResult", "RoutingPlan", "RoutingStats", "build_moe", "choose_overlap"]
