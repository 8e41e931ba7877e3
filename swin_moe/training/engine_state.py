"""A model's masters and moments by logical name, wherever DeepSpeed keeps them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import Fragment, whole_fragments
from ..distributed import World
from .adamw import MOMENTS, PAIRS, PairedAdamW, moment_views, start_moments


class _Part(NamedTuple):
    """This rank's part of a flattened parameter, from element ``start`` on, by kind."""

    name: str
    start: int
    values: dict[str, Tensor]


@dataclass
class EngineState:
    """This rank's masters and moments at every ZeRO stage.

    Attributes:
        zero: DeepSpeed's optimizer; at stage 0 the optimizer itself.
        optimizer: the optimizer that holds the moments.
        parameters: by name, as the model was built.
        buffers: those that belong in a checkpoint.
        expert_names: parameters that only the expert-data group replicates.
    """

    world: World
    stage: int
    zero: Any
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    expert_names: set[str]

    def __post_init__(self) -> None:
        self._start_moments(0)

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of masters and moments, without copies; parts do not overlap.

        At ZeRO stage 0, where all ranks hold the same, the parts share the work. Rank 0 yields the
        persistent buffers. A fragment is valid until the next one is taken.
        """
        for name, start, values in self._parts():
            if values["weight"].numel():
                yield Fragment(name, self._shape(name), start, values)
        if self.world.is_main:
            yield from whole_fragments((n, {"weight": t}) for n, t in self.buffers.items())

    @property
    def saved_bytes(self) -> int:
        """Approximate bytes of this rank's fragments."""
        each = 4 + (4 if isinstance(self.optimizer, PairedAdamW) else 8)
        total = 0
        for name in self.parameters:
            replicas = self.world.expert_data if name in self.expert_names else self.world
            total += each * math.prod(self._shape(name)) // replicas.size
        return total

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
        """Set this rank's part of masters and moments.

        The module's own weights and buffers must have been loaded before the engine was built.

        Args:
            read: returns elements ``start`` to ``stop`` of a flattened parameter on this rank, 1-D,
                for ``(name, kind, start, stop)``.
            updates: number of updates made so far.
        """
        self._start_moments(updates)
        for name, start, values in self._parts(to_load=True):
            for kind, target in values.items():
                if target.numel():
                    target.copy_(read(name, kind, start, start + target.numel()))

    def _shape(self, name: str) -> tuple[int, ...]:
        parameter = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: under ZeRO-3

    def _parts(self, to_load: bool = False) -> Iterator[_Part]:
        """Yield this rank's part of every parameter.

        Args:
            to_load: yield all elements on this rank, not only its share of a save, and keep
                changes to them.
        """
        if self.stage == 0:
            yield from self._parts_of_replicas(to_load)
        elif self.stage == 3:
            yield from self._parts_of_shards(to_load)
        else:
            yield from self._parts_of_partitions()

    def _parts_of_replicas(self, to_load: bool) -> Iterator[_Part]:
        for name, parameter in self.parameters.items():
            part = slice(0, parameter.numel())
            if not to_load:
                replicas = self.world.expert_data if name in self.expert_names else self.world
                size = -(-parameter.numel() // replicas.size)
                part = slice(replicas.rank * size, (replicas.rank + 1) * size)
            moments = moment_views(self.optimizer.state[parameter])
            state = {"weight": parameter.data.view(-1), **moments}
            yield _Part(name, part.start, {kind: t[part] for kind, t in state.items()})

    def _parts_of_partitions(self) -> Iterator[_Part]:
        """Yield the parts under ZeRO-1 and 2, which cut the concatenation of all parameters."""
        for name, parameter in self.parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # all of it is on other ranks
                continue
            moments = moment_views({k: mapping.get_hp_fragment(k) for k in self._moment_keys})
            start = mapping.lp_fragment_address.start
            yield _Part(name, start, {"weight": mapping.get_hp_fragment(), **moments})

    def _parts_of_shards(self, to_load: bool) -> Iterator[_Part]:
        """Yield the parts under ZeRO-3, which cuts every parameter."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for index, parameters in enumerate(self.zero.fp16_groups):
            with self._resident(index, keep=to_load) as flat:
                state = {"weight": flat.data, **moment_views(self.optimizer.state[flat])}
                for parameter in parameters:
                    _, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
                    start = self.world.rank * size
                    used = min(max(parameter.ds_numel - start, 0), size)  # the rest is padding
                    values = {kind: t[offset : offset + used] for kind, t in state.items()}
                    yield _Part(names[id(parameter)], start, values)

    @contextlib.contextmanager
    def _resident(self, index: int, keep: bool) -> Iterator[Tensor]:
        """Give ZeRO-3's flat fp32 weights of one sub-group, read from NVMe if they are there.

        Args:
            keep: write them back.
        """
        swapped = self.zero._swappable_optimizer_subgroup(index)
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_in(index)
        yield self.zero.fp32_partitioned_groups_flat[index]
        if swapped and keep:
            self.zero._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            self.zero._release_swap_buffers(index)

    def _start_moments(self, updates: int) -> None:
        """Create the optimizer's state before its first step.

        DeepSpeed maps parameters to moments after the first *group* has stepped, when moments that
        are created lazily do not exist in the other groups.
        """
        if self.stage == 3:
            for index in range(len(self.zero.fp16_groups)):
                with self._resident(index, keep=True) as flat:
                    start_moments(self.optimizer.state[flat], flat, updates, self._moment_keys)
            return
        for group in self.optimizer.param_groups:
            for flat in group["params"]:  # whole parameters, or ZeRO's parts
                start_moments(self.optimizer.state[flat], flat, updates, self._moment_keys)
        if self.stage > 0:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    @property
    def _moment_keys(self) -> tuple[str, ...]:
        return (PAIRS,) if isinstance(self.optimizer, PairedAdamW) else MOMENTS
