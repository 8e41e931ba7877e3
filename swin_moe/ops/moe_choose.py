"""The discrete part of expert choice: the tokens of each expert, as row maps."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .leaving import is_leaving, stable_order


def moe_choose(
    scores: Tensor, finite: Tensor, groups: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each expert's ``capacity`` best tokens per group, ties to the lower index.

    Args:
        scores: [T, E].
        finite: [T] bool; other tokens are never chosen.
        groups: number of equal runs of consecutive tokens.
        capacity: tokens per expert and group.

    Returns:
        source [E·groups·capacity] and destination [T, E], both int32, as in ``moe_dispatch`` with
        k = E; used [E] int64.
    """
    choose = _choose if is_leaving() else torch.ops.swin_moe.moe_choose
    return choose(scores.detach(), finite, groups, capacity)


def _choose(
    scores: Tensor, finite: Tensor, groups: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    T, E = scores.shape
    # Per expert: [E, groups, tokens of a group], with non-finite tokens last.
    ranked = scores.masked_fill(~finite[:, None], -torch.inf).t().reshape(E, groups, T // groups)
    best = stable_order(ranked, 2, descending=True)[..., :capacity]
    first = torch.arange(groups, device=scores.device)[:, None] * (T // groups)
    token = (best + first).flatten()  # [E · groups · capacity], row by row
    expert = torch.arange(E, device=scores.device)[:, None].expand(E, groups * capacity).flatten()
    taken = finite[token]
    source = torch.where(taken, token * E + expert, -1).to(torch.int32)
    destination = torch.full((T * E + 1,), -1, dtype=torch.int32, device=scores.device)
    rows = torch.arange(source.numel(), dtype=torch.int32, device=scores.device)
    destination[torch.where(taken, token * E + expert, T * E)] = rows
    # Empty rows are zeros and are computed with the others.
    used = torch.full((E,), groups * capacity, dtype=torch.int64, device=scores.device)
    return source, destination[: T * E].view(T, E).clone(), used


_library.declare(
    "moe_choose(Tensor scores, Tensor finite, int groups, int capacity)"
    " -> (Tensor, Tensor, Tensor)",
    _choose,
    internal=True,
)


@torch.library.register_fake("swin_moe::moe_choose")
def _(scores: Tensor, finite: Tensor, groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    T, E = scores.shape
    source = scores.new_empty(E * groups * capacity, dtype=torch.int32)
    destination = scores.new_empty(T, E, dtype=torch.int32)
    return source, destination, scores.new_empty(E, dtype=torch.int64)
