"""Mixture-of-Experts layers: plan, router, balance, dispatch, experts, layer."""

from .layer import MoELayer, MoEResult, build_moe
from .plan import RoutingPlan

__all__ = ["MoELayer", "MoEResult", "RoutingPlan", "build_moe"]
