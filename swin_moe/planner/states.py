"""Formulas for the memory of weights, gradients, optimizer and buckets in DeepSpeed 0.19.

They follow its ``zero/stage_1_and_2.py`` and ``zero/stage3.py``. ``benchmarks/planner.py`` compares
them with the allocator's statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..distributed.expert_placement import BUCKET, SUB_GROUP
from ..training.optim import parameter_groups

PERSISTENT = 100_000  # ZeRO-3 keeps parameters of fewer elements whole
LIVE = 1_000_000_000  # elements of gathered parameters that ZeRO-3 keeps before it frees one
PREFETCH = 50_000_000  # elements that it gathers ahead


@dataclass(frozen=True)
class ParameterGroup:
    """One of the optimizer's groups on a rank.

    Attributes:
        sizes: elements of each tensor.
        expert: the tensors are experts.
        replicas: ranks that share its states.
    """

    sizes: tuple[int, ...]
    expert: bool
    replicas: int = 1

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def part(self) -> int:
        """The elements of one replica's part; the whole is padded to twice the replicas."""
        return -(-self.elements // (2 * self.replicas)) * 2


def groups_of(model: nn.Module, decay: float, layer_decay: float) -> list[ParameterGroup]:
    """Return the groups of a model on the meta device, with one replica each."""
    return [
        ParameterGroup(tuple(p.numel() for p in group["params"]), group["moe"])
        for group in parameter_groups(model, decay, layer_decay)
    ]


def spread(
    groups: list[ParameterGroup], world: int, expert_parallel_size: int
) -> list[ParameterGroup]:
    """Return the groups with the number of their replicas in a world."""
    return [replace(g, replicas=world // (expert_parallel_size if g.expert else 1)) for g in groups]


@dataclass(frozen=True)
class States:
    """The bytes of a rank, without activations.

    Attributes:
        weights: held throughout.
        optimizer: masters and moments, held throughout.
        gradients: held between the backward pass and the update.
        full_gradients: the gradients grow to that during the backward pass; otherwise only pieces
            exist during it.
        buckets: of reductions and gathers during the passes.
        bucket: elements of gradients from which on ``flush`` more bytes are held.
        flush: see ``bucket``.
        between: buckets that are held throughout.
        update: of the optimizer's step, in addition to weights, optimizer and gradients.
        host: in the host's memory.
    """

    weights: int
    gradients: int
    full_gradients: bool
    optimizer: int = 0
    buckets: int = 0
    bucket: int = 0
    flush: int = 0
    between: int = 0
    update: int = 0
    host: int = 0


def states(
    groups: list[ParameterGroup],
    *,
    stage: int,
    half: bool,
    offload: str,
    accelerator: bool,
    accumulates: bool,
    moment_bytes: int = 8,
    weights_away: bool = False,
    minimum_bucket: int = BUCKET,
) -> States:
    """Return the memory of one rank.

    Args:
        groups: of the rank.
        stage: of ZeRO.
        half: weights and gradients are bf16 or fp16, otherwise fp32.
        offload: of the optimizer, ``none``, ``cpu`` or ``nvme``.
        accelerator: the device has its own memory.
        accumulates: several micro-batches make an update.
        moment_bytes: of both moments of an element.
        weights_away: ZeRO-3 keeps its parts of the weights in host memory or files.
        minimum_bucket: elements.
    """
    if stage == 0:
        return _replicated(groups, moment_bytes)
    width = 2 if half else 4
    part = sum(g.part for g in groups)
    optimizer = (moment_bytes + 4) * part  # ZeRO-3 also clones masters that are fp32 already
    host, away = 0, offload != "none" and accelerator
    if offload == "nvme":
        optimizer = 0
    elif offload == "cpu":
        optimizer += (4 + width * (stage < 3)) * part  # gradients of the masters, and a copy
    if away:
        optimizer, host = 0, optimizer
    largest = max(min(g.part, SUB_GROUP if stage == 3 else g.part) for g in groups)
    # The gradient of a group in fp32; ZeRO 1 and 2 make it from a flattened copy.
    copies = 4 + (width if stage < 3 and half else 0)
    update = 0 if offload != "none" else copies * largest
    if stage == 3:
        held = _cut(groups, width, minimum_bucket, away, weights_away and accelerator)
    else:
        held = _sliced(groups, width, stage, minimum_bucket, offload, accelerator, accumulates)
    return replace(held, optimizer=optimizer, update=update, host=held.host + host)


def _replicated(groups: list[ParameterGroup], moment_bytes: int) -> States:
    """Return the memory of ZeRO 0: everything on every rank, in fp32."""
    elements = sum(g.elements for g in groups)
    largest = max(size for g in groups for size in g.sizes)
    flattened = min(elements, 500_000_000 + largest)
    return States(
        weights=4 * elements,
        optimizer=moment_bytes * elements,
        gradients=4 * elements,
        full_gradients=True,
        update=4 * flattened,
    )


def _sliced(
    groups: list[ParameterGroup],
    width: int,
    stage: int,
    minimum_bucket: int,
    offload: str,
    accelerator: bool,
    accumulates: bool,
) -> States:
    """Return the memory of ZeRO 1 and 2, which cut the concatenation of a group."""
    elements = sum(g.elements for g in groups)
    bucket = max(minimum_bucket, *(size for g in groups for size in g.sizes))
    owned = width * sum(g.part for g in groups) if offload == "none" else 0
    return States(
        weights=width * sum(g.part * g.replicas for g in groups),
        gradients=width * elements if stage == 1 and accumulates else owned,
        full_gradients=stage == 1,
        buckets=width * bucket * (2 if accelerator else 1),  # one is filled, one on its way
        bucket=bucket,
        # A reduction flattens the bucket again; ZeRO-2 copies its part.
        flush=width * min(bucket, elements) + (owned if stage == 2 else 0),
    )


def _cut(
    groups: list[ParameterGroup], width: int, bucket: int, away: bool, weights_away: bool
) -> States:
    """Return the memory of ZeRO-3, which cuts every parameter.

    Args:
        away: the optimizer is in another memory.
        weights_away: the weights are in another memory.
    """
    elements = sum(g.elements for g in groups)
    part = width * sum(g.part for g in groups)
    kept = sum(size for g in groups if g.replicas > 1 for size in g.sizes if size < PERSISTENT)
    sharded = sum(g.elements for g in groups if g.replicas > 1) - kept
    return States(
        weights=width * kept + (0 if weights_away else part),
        gradients=0 if away else part,
        full_gradients=False,
        # Gathered weights, and the output of a gather that is not yet sorted.
        buckets=width * (min(sharded, LIVE) + min(sharded, PREFETCH)),
        bucket=bucket,
        flush=width * min(bucket, elements),
        between=width * bucket,
        host=(part if away else 0) + (part if weights_away and away else 0),
    )
