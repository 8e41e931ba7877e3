"""Build the MoE layer of a config section."""

from __future__ import annotations

from ..config import MoEConfig
from ..distributed import Group
from .layer import MoELayer


def build_moe(
    dim: int,
    hidden_dim: int,
    moe: MoEConfig,
    group: Group | None = None,
    *,
    initialise: bool = True,
) -> MoELayer:
    """Build the layer of ``moe.backend``; for the arguments see :class:`MoELayer`.

    Raises:
        ValueError: the backend is Tutel, and it is not installed or lacks an option of ``moe``.
    """
    kind = MoELayer
    if moe.backend == "tutel":
        from .tutel import TutelLayer as kind

    return kind(dim, hidden_dim, moe, group, initialise=initialise)
