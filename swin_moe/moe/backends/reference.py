"""Plain PyTorch throughout, for any float dtype: what the other backends are held against."""

from ...config import MoEConfig
from ...distributed import Group
from ...ops import (
    moe_combine_reference,
    moe_dispatch_reference,
    moe_experts_reference,
    moe_route_reference,
)
from ..layer import MoELayer
from ..plan import Kernels

KERNELS = Kernels(
    moe_route_reference, moe_dispatch_reference, moe_combine_reference, moe_experts_reference
)


def build(
    dim: int, hidden_dim: int, moe: MoEConfig, group: Group | None, initialise: bool
) -> MoELayer:
    return MoELayer(dim, hidden_dim, moe, group, KERNELS, initialise=initialise)
