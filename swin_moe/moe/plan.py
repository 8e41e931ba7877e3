"""The routing plan: which expert takes which token, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Routing of T tokens to k of E experts.

    Attributes:
        expert: [T, k] int64, chosen expert of each assignment.
        gate: [T, k] fp32, weight of each assignment; the only differentiable member.
        slot: [T, k] int64, place in the expert's queue (dropped ones too).
        counts: [E] int64, assignments per expert before any is dropped.
        kept: [T, k] bool, whether the slot lies within the capacity.
        capacity: slots per expert; 0 = dropless (every queue as long as it is).
    """

    expert: Tensor
    gate: Tensor
    slot: Tensor
    counts: Tensor
    kept: Tensor
    capacity: int

    def row_index(self) -> tuple[Tensor, Tensor]:
        """The plan as two inverse row maps, expert by expert, for the dispatch ops.

        Returns:
            source: [S] int32, the assignment t·k+j that fills each row, −1 for an empty one.
            destination: [T, k] int32, the row of each assignment, −1 for a dropped one.
            S = E·capacity, or T·k when dropless (rows then follow each other without gaps).
        """
        if self.capacity:
            rows = self.counts.numel() * self.capacity
            start = self.expert * self.capacity
        else:
            rows = self.expert.numel()
            start = (self.counts.cumsum(0) - self.counts)[self.expert]
        destination = start + self.slot
        # Dropped assignments write to one row too many, which is cut off: fixed shapes, no sync.
        assignment = torch.arange(self.expert.numel(), device=start.device, dtype=torch.int32)
        source = torch.full((rows + 1,), -1, device=start.device, dtype=torch.int32)
        source[torch.where(self.kept, destination, rows).flatten()] = assignment
        destination = torch.where(self.kept, destination, -1).to(torch.int32)
        return source[:rows], destination


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Slots per expert: k·int(f·⌈T/E⌉), Tutel's rule, at least one; 0 if ``factor`` is 0."""
    if factor == 0:
        return 0
    return max(1, top_k * int(factor * -(-num_tokens // num_experts)))


@torch.no_grad()
def queue_slots(expert: Tensor, num_experts: int, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    """Place of every assignment in its expert's queue.

    All first choices come before all second ones; within a choice, tokens stand in the order of
    descending ``priority`` (batch-prioritised routing, https://arxiv.org/abs/2106.05974, section 4)
    or of their index; ties by index.

    Args:
        expert: [T, k] chosen experts.
        priority: [T], or None for the order of the index.

    Returns:
        slot [T, k] and counts [E], both int64.
    """
    T, k = expert.shape
    device = expert.device
    order = torch.arange(T, device=device)
    if priority is not None:
        order = priority.argsort(descending=True, stable=True)
    queue = expert[order].t().reshape(-1)  # [k·T], choice by choice
    by_expert = queue.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, queue, torch.ones_like(queue))
    start = counts.cumsum(0) - counts
    place = torch.arange(k * T, device=device) - start[queue[by_expert]]
    slot = torch.empty_like(queue)
    slot[by_expert] = place
    unordered = torch.empty((T, k), dtype=torch.int64, device=device)
    unordered[order] = slot.view(k, T).t()
    return unordered, counts
