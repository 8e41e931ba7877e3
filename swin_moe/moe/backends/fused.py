"""The compiled ops, each of which runs its reference where it has no kernel."""

from ...config import MoEConfig
from ...distributed import Group
from ...ops import moe_combine, moe_dispatch, moe_experts, moe_route
from ..layer import MoELayer
from ..plan import Kernels

KERNELS = Kernels(moe_route, moe_dispatch, moe_combine, moe_experts)


def build(
    dim: int, hidden_dim: int, moe: MoEConfig, group: Group | None, initialise: bool
) -> MoELayer:
    return MoELayer(dim, hidden_dim, moe, group, KERNELS, initialise=initialise)
