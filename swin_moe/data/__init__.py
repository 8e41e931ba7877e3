"""Datasets, transforms and resumable batches.

:func:`build_loader` opens whatever holds images; its batches depend on seed, epoch and position
alone.
"""

from typing import TYPE_CHECKING

from ..common.deferred import exports

if TYPE_CHECKING:
    from .dataset import Batch
    from .loader import Loader, build_loader, loader_of

__all__ = ["Batch", "Loader", "build_loader", "loader_of"]

# What prepares and verifies data must not wait for torch.
__getattr__ = exports(
    __name__,
    {
        "Batch": "dataset",
        "Loader": "loader",
        "build_loader": "loader",
        "loader_of": "loader",
    },
)
