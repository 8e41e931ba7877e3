"""Reading any span of any tensor from the files of all ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.reading import openable
from ..distributed import set_rng_state
from ..distributed.expert_placement import ExpertLayout, ExpertShare, shard_axis
from .contents import Contents
from .folder import CheckpointError, rank_file
from .fragments import Entry, key

RNG = "rng."  # keys of generator states


class Reader(Contents):
    """Tensors of one checkpoint by logical name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._handles: dict[int, Any] = {}

    def tensor(self, name: str, kind: str = "weight", share: ExpertShare | None = None) -> Tensor:
        """Read one tensor: a share of stacked experts, or all of it.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or not all of the share.
        """
        shape = self._entry(name, kind).shape
        if share is not None:
            shape = [part.stop - part.start for part in share.index(name, tuple(shape))]
        return self.values(name, kind, share, 0, math.prod(shape)).view(shape)

    def values(
        self, name: str, kind: str, share: ExpertShare | None, start: int, stop: int
    ) -> Tensor:
        """Read elements [start, stop) of the share (None: of the whole), row-major, 1-D.

        Raises:
            CheckpointError: see :meth:`tensor`.
        """
        entry = self._entry(name, kind)
        if share is None and entry.shards == 1:
            return self._elements(name, kind, entry, 0, start, stop)
        share = share or ExpertShare(range(entry.shape[0]))
        experts = share.experts
        if experts.stop > entry.shape[0]:
            raise CheckpointError(
                f"{self.path}: '{name}' has {entry.shape[0]} experts, not {experts.stop}"
            )
        if share.shards != entry.shards:
            return self._recut(name, kind, entry, share).flatten()[start:stop]
        each = math.prod(entry.shape[1:]) // entry.shards
        first = experts.start * each
        return self._elements(name, kind, entry, share.shard, first + start, first + stop)

    def _entry(self, name: str, kind: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None or kind not in entry.kinds:
            raise CheckpointError(
                f"{self.path}: has no tensor '{key(name, kind)}': another model wrote it"
            )
        return entry

    def _recut(self, name: str, kind: str, entry: Entry, share: ExpertShare) -> Tensor:
        """Read a share if the checkpoint cuts the experts into another number of parts."""
        axis, experts = shard_axis(name), share.experts
        shape = [len(experts), *entry.shape[1:]]
        shape[axis] //= entry.shards
        each = math.prod(shape[1:])
        first, last = experts.start * each, experts.stop * each
        parts = [
            self._elements(name, kind, entry, shard, first, last).view(shape)
            for shard in range(entry.shards)
        ]
        alone = ExpertShare(range(len(experts)), share.shard, share.shards)
        return alone.of(name, torch.cat(parts, axis)).contiguous()

    def _elements(
        self, name: str, kind: str, entry: Entry, shard: int, start: int, stop: int
    ) -> Tensor:
        """Read elements [start, stop) of one part of the tensor of all experts."""
        pieces, position = [], start
        for span in sorted(entry.spans, key=lambda span: span.start):
            low, high = max(span.start, start), min(span.stop, stop)
            if span.shard == shard and low < high:
                values = self._file(span.rank).get_slice(key(name, kind))
                pieces.append(values[low - span.start : high - span.start])
                position = high
        if position != stop:
            raise CheckpointError(
                f"{self.path}: '{key(name, kind)}' has {position - start} of {stop - start} "
                "elements"
            )
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _file(self, rank: int) -> Any:
        """Open a rank's file, once."""
        if rank not in self._handles:
            name = rank_file(rank)
            if name not in self.files:
                raise CheckpointError(f"{self.path}: manifest.json names no {name}")
            try:
                with openable(self.path / name) as file:
                    handle = safe_open(file, framework="pt", device="cpu")
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.path / name} is gone: a running training has removed it; try again"
                ) from None
            except OSError as error:
                raise CheckpointError(
                    f"{self.path / name}: cannot be read ({error.strerror or error})"
                ) from None
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self.path / name}: not a safetensors file ({error})"
                ) from None
            self._handles[rank] = handle
        return self._handles[rank]

    def restore_rng(self, rank: int) -> bool:
        """Set this rank's generators; return False if the checkpoint is of fewer ranks."""
        states = self.rng_states(rank)
        if states:
            set_rng_state({k.removeprefix(RNG): state for k, state in states.items()})
        return bool(states)

    def rng_states(self, rank: int) -> dict[str, Tensor]:
        """Return a rank's generator states by their names in its file."""
        if rank_file(rank) not in self.files:
            return {}
        file = self._file(rank)
        return {k: file.get_tensor(k) for k in file.keys() if k.startswith(RNG)}  # noqa: SIM118


def persistent_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers by name."""
    parameters = dict(model.named_parameters())
    return {
        name: t for name, t in model.state_dict(keep_vars=True).items() if name not in parameters
    }


@torch.no_grad()
def load_weights(model: torch.nn.Module, reader: Reader, layout: ExpertLayout) -> None:
    """Copy master weights into a model that DeepSpeed has not wrapped yet.

    Copy persistent buffers too; those that the checkpoint lacks stay unchanged.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    load_buffers(model, reader, layout)
    for name, parameter in model.named_parameters():
        load_weight(name, parameter, reader, layout)


@torch.no_grad()
def load_buffers(model: torch.nn.Module, reader: Reader, layout: ExpertLayout) -> None:
    """Copy only the persistent buffers, see :func:`load_weights`."""
    known = set(reader.names())
    for name, buffer in persistent_buffers(model).items():
        if name in known:
            load_weight(name, buffer, reader, layout)


@torch.no_grad()
def load_weight(name: str, target: Tensor, reader: Reader, layout: ExpertLayout) -> None:
    """Copy one tensor of a checkpoint; raise like :func:`load_weights`."""
    value = reader.tensor(name, share=layout.share_of(name))
    if value.shape != target.shape:
        raise CheckpointError(
            f"{reader.path}: '{name}' has shape {list(value.shape)}, the model's is "
            f"{list(target.shape)}"
        )
    target.copy_(value)
