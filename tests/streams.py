"""Stand-ins for CUDA streams and events that record what each stream has waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch


class Stream:
    """A stream: ``done`` are the operations that end before the next one on it begins."""

    def __init__(self, device: object = None) -> None:
        self.done: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self._add(other.done)

    def wait_event(self, event: Event) -> None:
        self._add(event.done)

    def _add(self, done: list[str]) -> None:
        self.done += [name for name in done if name not in self.done]


class Event:
    """An event: what its stream had done when it was recorded."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.waited = 0

    def record(self, stream: Stream | None = None) -> None:
        self.done = list((stream or torch.cuda.current_stream()).done)

    def synchronize(self) -> None:
        self.waited += 1


class OnDevice(torch.Tensor):
    """A tensor on the host that says it is on a GPU."""

    is_cuda = True


class Streams:
    """The stand-ins in place of ``torch.cuda``'s; ``main`` is the first current stream."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.main = self.current = Stream()
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self._use)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)

    @contextlib.contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, name: str) -> None:
        """Launch an operation on the current stream."""
        self.current.done.append(name)
