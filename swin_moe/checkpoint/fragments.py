"""Spans of tensors: those that one rank holds, and their places in the whole tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..distributed.expert_placement import ExpertLayout
from .folder import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one tensor that this rank holds, in row-major order.

    Attributes:
        shape: of the tensor on this rank; for experts, of its share.
        start: of the span in that tensor.
        values: by kind, equally long, 1-D; no two ranks may hold the same span.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, Tensor]

    @property
    def stop(self) -> int:
        return self.start + next(iter(self.values.values())).numel()


def whole_fragments(states: Iterable[tuple[str, dict[str, Tensor]]]) -> Iterator[Fragment]:
    """Yield whole tensors by name and kind, each as one span."""
    for name, kinds in states:
        shape = tuple(next(iter(kinds.values())).shape)
        yield Fragment(name, shape, 0, {k: t.detach().reshape(-1) for k, t in kinds.items()})


def key(name: str, kind: str) -> str:
    """Return a tensor's name in a file."""
    return name if kind == "weight" else f"{name}.{kind}"


class Span(NamedTuple):
    """A span of one tensor in one rank's file.

    Attributes:
        rank: of the file.
        shard: part of the experts' width, 0 if it is whole.
        start: first element in that part of the tensor of all experts.
        stop: one after the last element.
    """

    rank: int
    shard: int
    start: int
    stop: int


@dataclass
class Entry:
    """A whole tensor and its spans.

    Attributes:
        shape: of all experts.
        shards: number of parts of the experts' width.
        kinds: ``weight``, and the moments if it is learnt.
        spans: in any order.
    """

    shape: list[int]
    shards: int
    kinds: list[str]
    spans: list[Span] = field(default_factory=list)

    def check_complete(self, name: str) -> None:
        """Raise :class:`CheckpointError` unless the spans cover every element once."""
        part = math.prod(self.shape) // self.shards
        for shard in range(self.shards):
            position = 0
            for span in sorted((r for r in self.spans if r.shard == shard), key=lambda r: r.start):
                if span.start != position or span.stop <= span.start:
                    raise CheckpointError(f"'{name}' has a gap or an overlap at element {position}")
                position = span.stop
            if position != part:
                raise CheckpointError(f"'{name}' has {position} of {part} elements")


def describe(fragment: Fragment, rank: int, layout: ExpertLayout) -> Entry:
    """Return the fragment as a span of the whole tensor."""
    whole = layout.whole_shape(fragment.name, fragment.shape)
    share = layout.share_of(fragment.name)
    offset, shard, shards = 0, 0, 1
    if share is not None:
        offset = share.experts.start * math.prod(fragment.shape[1:])
        shard, shards = share.shard, share.shards
    span = Span(rank, shard, offset + fragment.start, offset + fragment.stop)
    return Entry(whole, shards, list(fragment.values), [span])


def merge(parts: Iterable[dict[str, Entry]]) -> dict[str, Entry]:
    """Join the entries of several ranks.

    Raises:
        CheckpointError: shapes differ, or elements are missing or there twice.
    """
    merged: dict[str, Entry] = {}
    for part in parts:
        for name, entry in part.items():
            known = merged.setdefault(name, Entry(entry.shape, entry.shards, entry.kinds))
            if (known.shape, known.shards, known.kinds) != (entry.shape, entry.shards, entry.kinds):
                raise CheckpointError(f"'{name}' has shape {known.shape} and {entry.shape}")
            known.spans += entry.spans
    for name, entry in merged.items():
        entry.check_complete(name)
    return merged


def to_json(entries: dict[str, Entry]) -> dict[str, Any]:
    return {name: vars(entry) for name, entry in entries.items()}


def from_json(content: dict[str, Any]) -> dict[str, Entry]:
    """Invert :func:`to_json`; raise ``ValueError`` or the like for other content."""
    return {
        str(name): Entry(
            [int(size) for size in entry["shape"]],
            int(entry["shards"]),
            [str(kind) for kind in entry["kinds"]],
            [Span(*(int(number) for number in span)) for span in entry["spans"]],
        )
        for name, entry in content.items()
    }
