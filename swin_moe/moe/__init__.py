"""The MoE layer, whatever carries its tokens, and what watches it in training.

``layer.py`` has the five stages: gate (``router.py``, then a routing mode), balance, dispatch,
experts, combine. ``plan.py`` is the plan between them. ``dispatcher.py`` carries rows to the
experts of other ranks, and ``monitor.py`` reports what the routers do.
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
