"""Batches on the device; on CUDA the next one is copied while the current one is used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .dataset import Batch
from .loader import Loader


class DeviceBatches(Iterator[Batch]):
    """An epoch of a loader, whose batches are on a device.

    On CUDA, :meth:`look_ahead` takes one more batch from the loader and starts its copy on a stream
    of its own. Nothing else is early: unreadable samples are listed, and errors are raised, when
    the batch is asked for.

    Args:
        epoch, start_batch: see :meth:`Loader.epoch`.
    """

    def __init__(
        self, loader: Loader, device: torch.device, epoch: int, start_batch: int = 0
    ) -> None:
        self._loader, self._device = loader, device
        self._raw = loader.read(epoch, start_batch)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: _Copy | Exception | None = None

    def __next__(self) -> Batch:
        self._take()
        taken, self._next = self._next, None
        if isinstance(taken, Exception):
            raise taken
        assert taken is not None
        mended = self._loader.mend(taken.batch)
        # Another batch stands in for one without any readable sample.
        return taken.arrive() if mended is taken.batch else mended.to(self._device)

    def look_ahead(self) -> None:
        """Take the next batch already; call it while the device is busy."""
        if self._stream is not None:
            self._take()

    def _take(self) -> None:
        if self._next is not None:
            return
        try:
            self._next = _Copy(next(self._raw), self._device, self._stream)
        except Exception as error:  # also the end of the epoch
            self._next = error


class _Copy:
    """A batch on its way from pinned memory to the device.

    Args:
        batch: on the host; it lives until the copy is waited for.
        stream: where the copy runs; None = the current one, which needs no wait.
    """

    def __init__(
        self, batch: Batch, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self.batch, self._done = batch, None
        if stream is None:
            self._there = batch.to(device)
            return
        with torch.cuda.stream(stream):
            self._there = batch.to(device)
        self._done = torch.cuda.Event()
        self._done.record(stream)

    def arrive(self) -> Batch:
        """Make the current stream wait for the copy; return the batch on the device."""
        if self._done is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self._done)
            for tensor in tree_leaves((self._there.inputs, self._there.targets, self._there.valid)):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)  # the copies' stream must not reuse its memory
        return self._there
