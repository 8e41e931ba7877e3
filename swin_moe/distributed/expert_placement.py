"""Which rank of an expert group holds which experts, or which part of one; ZeRO's pieces."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BUCKET = 50_000_000  # elements that are reduced at once; DeepSpeed's 500 million take 2 GB in bf16
# Elements that ZeRO-3 updates at a time; it copies their gradients, and reads them from files, at
# once. DeepSpeed's default is 1e9, of which every rank then has a few copies.
SUB_GROUP = 50_000_000


@dataclass(frozen=True)
class ExpertShare:
    """What one rank holds of every layer's experts.

    Attributes:
        experts: global indices.
        shard, shards: the part of the experts' hidden width, of equal parts; (0, 1) is all of it.
    """

    experts: range
    shard: int = 0
    shards: int = 1

    def index(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where this share lies in the tensor ``name`` of all experts, which has that shape."""
        index = [slice(0, size) for size in shape]
        index[0] = slice(self.experts.start, self.experts.stop)
        axis = shard_axis(name)
        width = shape[axis] // self.shards
        index[axis] = slice(self.shard * width, (self.shard + 1) * width)
        return tuple(index)

    def of(self, name: str, whole: Tensor) -> Tensor:
        """This share of the tensor ``name`` of all experts."""
        return whole[self.index(name, tuple(whole.shape))]


def shard_axis(name: str) -> int:
    """The axis along which shards cut an expert tensor.

    The hidden width runs along fc1.weight [E, H, D], fc1.bias [E, H] and fc2.weight [E, D, H];
    of fc2.bias [E, D] each shard adds a part, so that every parameter exists once.
    """
    return 2 if name.endswith("fc2.weight") else 1


def expert_share(num_experts: int, rank: int, size: int) -> ExpertShare:
    """The share of one rank of a group: E / size experts, or 1 / (size / E) of one.

    Raises:
        ValueError: neither of the two numbers is a multiple of the other.
    """
    if num_experts % size == 0:
        count = num_experts // size
        return ExpertShare(range(rank * count, (rank + 1) * count))
    if size % num_experts:
        raise ValueError(
            f"moe.num_experts={num_experts} is not divisible by the expert group's {size} ranks, "
            "nor the other way round"
        )
    expert, shard = divmod(rank, size // num_experts)
    return ExpertShare(range(expert, expert + 1), shard, size // num_experts)


@dataclass(frozen=True)
class ExpertLayout:
    """What of a model's tensors this rank holds: of expert tensors a share, all of the others.

    Attributes:
        expert_names: tensors that are stacked experts.
    """

    expert_names: Set[str]
    num_experts: int
    share: ExpertShare

    def share_of(self, name: str) -> ExpertShare | None:
        """The share of an expert tensor; None of one that every rank holds whole."""
        return self.share if name in self.expert_names else None

    def whole_shape(self, name: str, local: tuple[int, ...]) -> list[int]:
        """Shape of the tensor of all experts, of which this rank holds one of shape ``local``."""
        shape = list(local)
        if name in self.expert_names:
            shape[0] = self.num_experts
            shape[shard_axis(name)] *= self.share.shards
        return shape


def whole_layout(expert_names: Set[str], num_experts: int) -> ExpertLayout:
    """One process with every expert."""
    return ExpertLayout(expert_names, num_experts, ExpertShare(range(num_experts)))
