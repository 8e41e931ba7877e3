"""What DeepSpeed 0.19 holds of a rank's parameters, by formula.

Read from its ``zero/stage_1_and_2.py`` and ``zero/stage3.py``, and held against the allocator's own
account by ``benchmarks/planner.py``. ``P`` is what a rank's model has, cut over ``N`` replicas.
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
    """One of the optimizer's groups as a rank has it: elements of its tensors, and replicas."""

    sizes: tuple[int, ...]
    expert: bool
    replicas: int = 1

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def part(self) -> int:
        """Elements of it that one replica keeps; the whole is padded to twice the replicas."""
        return -(-self.elements // (2 * self.replicas)) * 2


def groups_of(model: nn.Module, decay: float, layer_decay: float) -> list[ParameterGroup]:
    """The groups of a model (on the meta device), replicas left at one."""
    return [
        ParameterGroup(tuple(p.numel() for p in group["params"]), group["moe"])
        for group in parameter_groups(model, decay, layer_decay)
    ]


def spread(
    groups: list[ParameterGroup], world: int, expert_parallel_size: int
) -> list[ParameterGroup]:
    """The groups with the replicas that there are of each."""
    return [replace(g, replicas=world // (expert_parallel_size if g.expert else 1)) for g in groups]


@dataclass(frozen=True)
class States:
    """Bytes on the device of a rank, beside activations.

    Attributes:
        weights, optimizer: held all the time, masters and moments the latter.
        gradients: held between the backward pass and the update.
        full_gradients: whether they grow to that during the backward pass; else only pieces exist.
        buckets: what reductions and gathers take during the passes; ``flush`` more bytes from the
            moment on at which ``bucket`` elements of gradients are there.
        between: buckets that are held at any time.
        update: what the optimizer's step takes on top of weights, optimizer, gradients.
        host: bytes in the host's memory.
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
    bf16: bool,
    offload: str,
    accelerator: bool,
    accumulates: bool,
    moment_bytes: int = 8,
    weights_away: bool = False,
    minimum_bucket: int = BUCKET,
) -> States:
    """Memory of one rank.

    Args:
        offload: ``none``, ``cpu`` or ``nvme``. accelerator: whether host memory is another one.
        accumulates: several micro-batches make an update.
        weights_away: ZeRO-3 keeps its parts of the weights in host memory or files, too.
        moment_bytes: of both moments of an element.
    """
    if stage == 0:
        return _replicated(groups, moment_bytes)
    width = 2 if bf16 else 4
    part = sum(g.part for g in groups)
    optimizer = (moment_bytes + 4) * part  # ZeRO-3 clones fp32 masters, too
    host, away = 0, offload != "none" and accelerator
    if offload == "nvme":
        optimizer = 0
    elif offload == "cpu":
        optimizer += (4 + width * (stage < 3)) * part  # a gradient of each master, a copy of it
    if away:
        optimizer, host = 0, optimizer
    largest = max(min(g.part, SUB_GROUP if stage == 3 else g.part) for g in groups)
    # The gradient of a group in fp32, which ZeRO 1 and 2 make of a flattened copy.
    copies = 4 + (width if stage < 3 and bf16 else 0)
    update = 0 if offload != "none" else copies * largest
    if stage == 3:
        held = _cut(groups, width, minimum_bucket, away, weights_away and accelerator)
    else:
        held = _sliced(groups, width, stage, minimum_bucket, offload, accelerator, accumulates)
    return replace(held, optimizer=optimizer, update=update, host=held.host + host)


def _replicated(groups: list[ParameterGroup], moment_bytes: int) -> States:
    """ZeRO 0: all of it on every rank, in fp32."""
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
    """ZeRO 1 and 2, without the optimizer's own: the concatenation of a group is cut."""
    elements = sum(g.elements for g in groups)
    bucket = max(minimum_bucket, *(size for g in groups for size in g.sizes))
    owned = width * sum(g.part for g in groups) if offload == "none" else 0
    return States(
        weights=width * sum(g.part * g.replicas for g in groups),
        gradients=width * elements if stage == 1 and accumulates else owned,
        full_gradients=stage == 1,
        buckets=width * bucket * (2 if accelerator else 1),  # one is filled, one on its way
        bucket=bucket,
        # What is reduced is flattened once more; ZeRO-2 keeps its part in a piece of its own.
        flush=width * min(bucket, elements) + (owned if stage == 2 else 0),
    )


def _cut(
    groups: list[ParameterGroup], width: int, bucket: int, away: bool, weights_away: bool
) -> States:
    """ZeRO-3, without the optimizer's own: every parameter is cut.

    Args:
        away, weights_away: whether the optimizer and the weights are in another memory.
    """
    elements = sum(g.elements for g in groups)
    part = width * sum(g.part for g in groups)
    kept = sum(size for g in groups if g.replicas > 1 for size in g.sizes if size < PERSISTENT)
    sharded = sum(g.elements for g in groups if g.replicas > 1) - kept
    return States(
        weights=width * kept + (0 if weights_away else part),
        gradients=0 if away else part,
        full_gradients=False,
        # Gathered weights, and those that a gather has just brought and not yet sorted.
        buckets=width * (min(sharded, LIVE) + min(sharded, PREFETCH)),
        bucket=bucket,
        flush=width * min(bucket, elements),
        between=width * bucket,
        host=(part if away else 0) + (part if weights_away and away else 0),
    )
