"""The MoE layer, the exchange of its rows between ranks, and its statistics in training.

``layer.py`` runs the five stages: gate (``router.py``, then a routing mode), balance, dispatch,
experts, combine; ``plan.py`` has the routing plan that they share. ``dispatcher.py`` exchanges rows
with the experts of other ranks, and ``monitor.py`` reports the routers' statistics.
"""

from .build import build_moe
from .health import lost_gate
from .layer import MoELayer, MoEResult
from .meter import LayerTotals
from .monitor import RouterMonitor, moe_layers, num_experts, update_expert_bias
from .plan import Routing, RoutingPlan, RoutingStats
from .tuning import choose_overlap

__all__ = [
    "LayerTotals",
    "MoELayer",
    "MoEResult",
    "RouterMonitor",
    "Routing",
    "RoutingPlan",
    "RoutingStats",
    "build_moe",
    "choose_overlap",
    "lost_gate",
    "moe_layers",
    "num_experts",
    "update_expert_bias",
]
