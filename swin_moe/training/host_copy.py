"""A copy of a small tensor on the host, for which the host does not wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A tensor's present values on their way to the host.

    A plain ``tensor.tolist()`` would wait for all that the device has been given until then.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._values = tensor.clone()
            return
        self._values = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def tolist(self) -> Any:
        """Wait until the values are here, and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
