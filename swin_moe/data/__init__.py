"""Sources of samples, transforms and resumable batches.

:func:`loader_of` opens folders, archives, lists and shards of images; its batches depend only on
seed, epoch and position. ``readers/`` has one file per format, ``tools/`` the commands on data.
"""

from typing import TYPE_CHECKING

from ..common.deferred import exports

if TYPE_CHECKING:
    from .dataset import Batch
    from .loader import Loader, loader_of
    from .prefetch import DeviceBatches

__all__ = ["Batch", "DeviceBatches", "Loader", "loader_of"]

# The commands that prepare and verify data must not wait for torch.
__getattr__ = exports(
    __name__,
    {"Batch": "dataset", "DeviceBatches": "prefetch", "Loader": "loader", "loader_of": "loader"},
)
