"""What computes a layer's stages. A backend is a file with ``build``; nothing else knows it."""

from __future__ import annotations

import importlib

from ...config import MoEConfig
from ...distributed import Group
from ..layer import MoELayer


def build(
    dim: int,
    hidden_dim: int,
    moe: MoEConfig,
    group: Group | None = None,
    *,
    initialise: bool = True,
) -> MoELayer:
    """The layer of the backend that ``moe.backend`` names, see :class:`MoELayer`.

    Raises:
        ValueError: the backend is Tutel, and it is not installed or cannot do what is asked.
    """
    # Imported only where it is asked for: Tutel is an optional extra.
    backend = importlib.import_module(f".{moe.backend}", __name__)
    layer: MoELayer = backend.build(dim, hidden_dim, moe, group, initialise)
    return layer
