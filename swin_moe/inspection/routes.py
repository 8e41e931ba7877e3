"""Records which expert takes which patch of an image, and adds the records up.

The layers store nothing: while they are watched, their ``route`` is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..moe import Routing, RoutingPlan, moe_layers

DROPPED = -1  # in place of an expert


class TokenExperts(NamedTuple):
    """The experts of the tokens of one forward pass in one layer.

    Attributes:
        expert: [B, H, W] int64, the expert with the greatest weight, or ``DROPPED``.
        weight: [B, H, W], its gate; with soft routing the greatest dispatch weight.
        counts: [E] int64, assignments per expert.
    """

    expert: Tensor
    weight: Tensor
    counts: Tensor


def token_experts(routing: Routing, grid: tuple[int, int, int]) -> TokenExperts:
    """Return the experts of T = B·H·W tokens, with any routing.

    Args:
        routing: of the T tokens.
        grid: (B, H, W).
    """
    plan: Any = routing.plan
    if isinstance(plan, RoutingPlan):
        gate = plan.gate.detach().masked_fill(~plan.kept, -torch.inf)
        weight, choice = gate.max(1)
        expert = plan.expert.gather(1, choice[:, None])[:, 0]
        taken = plan.kept.any(1)
    else:
        slots = plan.into_slots.detach().flatten(0, 1)  # [T, E·s]
        weight, slot = slots.max(1)
        expert = slot // (slots.shape[1] // plan.used.numel())
        taken = weight > 0
    expert = torch.where(taken, expert, DROPPED)
    weight = torch.where(taken, weight, 0.0)
    return TokenExperts(expert.view(grid), weight.view(grid).float(), routing.stats.counts)


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, TokenExperts]]:
    """Return a context whose value has the experts of the last forward pass, by MoE layer."""
    seen: dict[str, TokenExperts] = {}
    layers = moe_layers(model)
    handles = []
    for name, layer in layers.items():
        grid: list[int] = []
        handles.append(layer.register_forward_pre_hook(partial(_note_grid, grid)))
        layer.route = partial(_route, layer.route, grid, seen, name)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for layer in layers.values():
            del layer.__dict__["route"]  # restores the method
        for handle in handles:
            handle.remove()


def _note_grid(grid: list[int], _layer: nn.Module, inputs: tuple[Tensor]) -> None:
    grid[:] = inputs[0].shape[:3]


def _route(
    route: Callable[..., Routing],
    grid: list[int],
    seen: dict[str, TokenExperts],
    name: str,
    *args: Any,
    **kwargs: Any,
) -> Routing:
    routing = route(*args, **kwargs)
    batch, height, width = grid
    seen[name] = token_experts(routing, (batch, height, width))
    return routing


class Crop(NamedTuple):
    """A patch that an expert took, with its weight and half a patch of surroundings [C, 2p, 2p]."""

    weight: float
    pixels: Tensor


@dataclass
class LayerFindings:
    """The experts of one layer over some images.

    Attributes:
        patch: pixels per token and side.
        counts: [E] assignments.
        classes: [E, C] tokens by expert and class of the image.
        dropped: tokens without an expert.
        maps: [H, W] expert per token, for each image to draw.
        best: crops of each expert, at most one per image, the greatest weight first.
    """

    patch: int
    counts: Tensor
    classes: Tensor
    dropped: int = 0
    maps: dict[int, Tensor] = field(default_factory=dict)
    best: list[list[Crop]] = field(default_factory=list)

    @classmethod
    def empty(cls, patch: int, experts: int, classes: int) -> LayerFindings:
        counts = torch.zeros(experts, dtype=torch.int64)
        table = torch.zeros(experts, classes, dtype=torch.int64)
        return cls(patch, counts, table, best=[[] for _ in range(experts)])

    @property
    def load(self) -> list[float]:
        """Shares [E] of the assignments."""
        return (self.counts / self.counts.sum().clamp(min=1)).tolist()

    def add(self, images: Tensor, labels: Tensor, found: TokenExperts, crops: int) -> None:
        """Add a batch.

        Args:
            images: [B, C, h, w] on the host, all valid.
            labels: [B].
            found: of the images.
            crops: to keep for each expert.
        """
        self.counts += found.counts.cpu()
        expert, weight = found.expert.cpu().flatten(1), found.weight.cpu().flatten(1)  # [B, HW]
        self.dropped += int((expert == DROPPED).sum())
        taken = expert != DROPPED
        width = self.classes.shape[1]
        if width:
            pairs = (expert * width + labels[:, None])[taken]
            self.classes += torch.bincount(pairs, minlength=self.classes.numel()).view(-1, width)
        columns = found.expert.shape[2]
        for index, kept in enumerate(self.best):
            # Only the best token of each image: neighbours look alike.
            score, token = weight.masked_fill(expert != index, -1.0).max(1)
            for image in score.argsort(descending=True)[:crops].tolist():
                value = float(score[image])
                if value < 0 or (len(kept) >= crops and value <= kept[-1].weight):
                    break
                place = divmod(int(token[image]), columns)
                kept.append(Crop(value, crop(images[image], place, self.patch)))
                kept.sort(key=lambda one: -one.weight)
                del kept[crops:]


def crop(image: Tensor, place: tuple[int, int], patch: int) -> Tensor:
    """Return the pixels [C, 2p, 2p] of a token with half a patch of surroundings.

    Surroundings outside of the image repeat its edge.

    Args:
        image: [C, h, w].
        place: (row, column) of the token.
        patch: p.
    """
    half = patch // 2
    sides = []
    for start, size in zip(place, image.shape[1:], strict=True):
        first = start * patch - half
        sides.append(torch.arange(first, first + 2 * half + patch).clamp(0, size - 1))
    return image[:, sides[0]][:, :, sides[1]].clone()
