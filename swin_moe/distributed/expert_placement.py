"""Computes which experts, or which part of one, each rank of an expert group holds."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BUCKET = 50_000_000  # elements reduced at once; DeepSpeed's 500 million take 2 GB in bf16
# Elements that ZeRO-3 updates at once. It holds a few copies of them, and reads as many from files
# at once. DeepSpeed's default is 1e9.
SUB_GROUP = 50_000_000


@dataclass(frozen=True)
class ExpertShare:
    """The share of one rank in the experts of every layer.

    Attributes:
        experts: global indices.
        shard: index of the part of the experts' hidden width.
        shards: number of equal parts of the hidden width; 1 = the rank holds all of it.
    """

    experts: range
    shard: int = 0
    shards: int = 1

    def index(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the slices of this share in the tensor ``name`` of all experts.

        Args:
            shape: of the tensor of all experts.
        """
        index = [slice(0, size) for size in shape]
        index[0] = slice(self.experts.start, self.experts.stop)
        axis = shard_axis(name)
        width = shape[axis] // self.shards
        index[axis] = slice(self.shard * width, (self.shard + 1) * width)
        return tuple(index)

    def of(self, name: str, whole: Tensor) -> Tensor:
        """Return this share of the tensor ``name`` of all experts."""
        return whole[self.index(name, tuple(whole.shape))]


def shard_axis(name: str) -> int:
    """Return the axis along which shards cut an expert tensor.

    It is the hidden width of fc1.weight [E, H, D], fc1.bias [E, H] and fc2.weight [E, D, H].
    fc2.bias [E, D] has none: each shard adds a part of D, so that every parameter exists once.
    """
    return 2 if name.endswith("fc2.weight") else 1


def expert_share(num_experts: int, rank: int, size: int) -> ExpertShare:
    """Return the share of one rank of a group: E / size experts, or 1 / (size / E) of one.

    Args:
        num_experts: E.
        rank: in the group.
        size: of the group.

    Raises:
        ValueError: neither E nor size is a multiple of the other.
    """
    if num_experts % size == 0:
        count = num_experts // size
        return ExpertShare(range(rank * count, (rank + 1) * count))
    if size % num_experts:
        raise ValueError(
            f"moe.num_experts={num_experts} is neither a multiple nor a divisor of the expert "
            f"group's {size} ranks (parallel.expert_parallel_size)"
        )
    expert, shard = divmod(rank, size // num_experts)
    return ExpertShare(range(expert, expert + 1), shard, size // num_experts)


@dataclass(frozen=True)
class ExpertLayout:
    """The tensors of a rank: its share of the expert tensors, and all others whole.

    Attributes:
        expert_names: tensors of stacked experts.
        num_experts: over all ranks.
        share: of this rank.
    """

    expert_names: Set[str]
    num_experts: int
    share: ExpertShare

    def share_of(self, name: str) -> ExpertShare | None:
        """Return this rank's share of an expert tensor, or None if every rank holds it whole."""
        return self.share if name in self.expert_names else None

    def whole_shape(self, name: str, local: tuple[int, ...]) -> list[int]:
        """Return the shape of the tensor of all experts.

        Args:
            local: shape of this rank's share.
        """
        shape = list(local)
        if name in self.expert_names:
            shape[0] = self.num_experts
            shape[shard_axis(name)] *= self.share.shards
        return shape


def whole_layout(expert_names: Set[str], num_experts: int) -> ExpertLayout:
    """Return the layout of a process that holds every expert."""
    return ExpertLayout(expert_names, num_experts, ExpertShare(range(num_experts)))
