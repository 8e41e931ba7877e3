"""Mixture-of-Experts layers: plan, router, balance, dispatch, experts, layer."""

from ..config import MoEConfig
from ..distributed import Group
from .layer import MoELayer, MoEResult
from .plan import RoutingPlan

__all__ = ["MoELayer", "MoEResult", "RoutingPlan", "build_moe"]


def build_moe(dim: int, hidden_dim: int, moe: MoEConfig, group: Group | None = None) -> MoELayer:
    """The layer of the backend that ``moe.backend`` names.

    Raises:
        ValueError: the backend is Tutel, which is not installed.
    """
    if moe.backend == "tutel":
        from .tutel import TutelLayer  # an optional extra: imported only where it is asked for

        return TutelLayer(dim, hidden_dim, moe, group)
    return MoELayer(dim, hidden_dim, moe, group)
