"""Routing, from logits to row maps: score, top-k, order, slots, counts and loss sums in one op.

Tokens choose experts (https://arxiv.org/abs/2006.16668); every expert queues those that chose it:
first choices before second ones, within a choice by descending score (batch-prioritised routing,
https://arxiv.org/abs/2106.05974, section 4) or by index, ties by index. What is past the capacity
is dropped. Tokens may be cut into groups (one per image) that queue apart from one another.

Rows are the experts' input, expert by expert, within one group by group, within one in the order of
the queue. They follow each other without gaps (packed), or every expert has an equal block
(padded), whose end then is empty.

A token whose logits are not all finite is dropped, takes part in no sum and gets no gradient; it is
counted (``scalars``), so that one bad token is neither spread nor hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from swin_moe.ops import _library


class RouteOptions(NamedTuple):
    """How to route; the same for every token of a call.

    Attributes:
        top_k: experts per token, 1 to E.
        sigmoid: scores are the logits' sigmoids, else their softmax.
        normalize: gates are divided by their sum over the token's k choices, before drops. For
            k = 1 that makes 1, whose gradient would be zero: it is taken as that of the score's
            logarithm, so that the router still learns from the task.
        prioritized: queue by descending best score, else by index.
        groups: equal runs of consecutive tokens that queue apart.
        capacity: places per expert and group; 0 = as many as are needed (dropless).
        padded: every expert has groups · capacity rows; else rows are packed.
        load_sigma: standard deviation of the gate noise, for the load estimate; 0 = no estimate.
    """

    top_k: int = 1
    sigmoid: bool = False
    normalize: bool = False
    prioritized: bool = False
    groups: int = 1
    capacity: int = 0
    padded: bool = False
    load_sigma: float = 0.0

    def rows(self, tokens: int, experts: int) -> int:
        """Rows S of the experts' input; known without looking at the logits."""
        places = experts * self.groups * self.capacity
        if self.padded:
            return places
        wanted = tokens * self.top_k
        return min(wanted, places) if self.capacity else wanted


class Route(NamedTuple):
    """Where T tokens with k choices each go; ``gate``, ``sums`` and ``scalars[0]`` have gradients.

    Attributes:
        expert: [T, k] int64, best first.
        gate: [T, k] in the logits' dtype; 0 for a token that is not finite.
        slot: [T, k] int32, place in the queue of the expert and group, dropped ones too; −1 for a
            token that is not finite.
        source: [S] int32, the assignment t·k+j of each row, −1 for an empty one.
        destination: [T, k] int32, the row of each assignment, −1 for a dropped one.
        counts: [E] int64, assignments, dropped ones included.
        first: [E] int64, first choices.
        used: [E] int64, assignments that were kept: the rows of each expert.
        sums: [3, E]: over tokens, of the noisy probabilities, of the clean ones (importance), and
            of the load estimate, see :func:`moe_route`.
        scalars: [5]: Σ logsumexp(logits)², Σ entropy of the noisy probabilities in nats, least and
            greatest logit (inf and −inf without any), number of tokens that are not finite.
    """

    expert: Tensor
    gate: Tensor
    slot: Tensor
    source: Tensor
    destination: Tensor
    counts: Tensor
    first: Tensor
    used: Tensor
    sums: Tensor
    scalars: Tensor


def moe_route(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, options: RouteOptions
) -> Route:
    """Route T tokens to k of E experts each.

    Probabilities are the scores (softmax), or the scores over their sum (sigmoid). The load of an
    expert is the chance that its clean probability beats the token's k-th noisy *logit* under the
    noise: Φ((p − l_k) / σ) summed over tokens; comparing a probability with a logit is odd, but is
    what Tutel does and the published models were trained with.

    Args:
        logits: [T, E] float32.
        noise: [T, E] to be added to the logits, or None.
        bias: [E] added to the scores where experts are chosen, never in the gate, or None
            (https://arxiv.org/abs/2408.15664).

    Raises:
        ValueError: a shape, a dtype or an option does not fit.
    """
    _check(logits, noise, bias, options)
    if not _library.has_kernel("moe_route", logits):
        return moe_route_reference(logits, noise, bias, options)
    return Route(*torch.ops.swin_moe.moe_route(logits, noise, bias, *options))


def moe_route_reference(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, options: RouteOptions
) -> Route:
    """:func:`moe_route` in plain PyTorch, for any float dtype; differentiable."""
    finite = logits.isfinite().all(1)
    clean = logits.masked_fill(~finite[:, None], 0.0)
    noisy = clean if noise is None else clean + noise.masked_fill(~finite[:, None], 0.0)
    scores, probabilities = _scores(noisy, options.sigmoid)
    chosen_by = scores.detach() if bias is None else scores.detach() + bias
    priority = scores.detach().amax(1)
    plan = torch.ops.swin_moe.moe_assign(chosen_by, priority, finite, *options)
    expert = plan[0]
    gate = scores.gather(1, expert)
    if options.normalize:
        total = gate.sum(1, keepdim=True).clamp(min=torch.finfo(gate.dtype).eps)
        gate = gate / (total if options.top_k > 1 else total.detach())
    gate = gate.masked_fill(~finite[:, None], 0.0)
    weight = finite.to(logits.dtype)[:, None]
    clean_probabilities = _scores(clean, options.sigmoid)[1]
    load = torch.zeros_like(clean)
    if options.load_sigma > 0:
        threshold = noisy.gather(1, expert[:, -1:])
        z = (clean_probabilities - threshold) / (options.load_sigma * math.sqrt(2.0))
        load = 0.5 * (1.0 + torch.erf(z))
    parts = (probabilities, clean_probabilities, load)
    sums = torch.stack([(part * weight).sum(0) for part in parts])
    z_sum = (clean.logsumexp(1).square() * weight[:, 0]).sum()
    scalars = _statistics(logits.detach(), probabilities.detach(), finite)
    slot, source, destination, counts, first, used = plan[1:]
    scalars = torch.cat((z_sum.view(1), scalars))
    return Route(expert, gate, slot, source, destination, counts, first, used, sums, scalars)


def _scores(logits: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Scores and probabilities [T, E]."""
    if not sigmoid:
        scores = logits.softmax(1)
        return scores, scores
    scores = logits.sigmoid()
    return scores, scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps)


def _statistics(logits: Tensor, probabilities: Tensor, finite: Tensor) -> Tensor:
    """[4]: entropy sum, least and greatest logit, tokens that are not finite."""
    entropy = torch.special.entr(probabilities).sum(1) * finite
    bad = ~finite[:, None]
    infinity = logits.new_full((1,), math.inf)
    least = torch.cat((logits.masked_fill(bad, math.inf).flatten(), infinity)).amin()
    greatest = torch.cat((logits.masked_fill(bad, -math.inf).flatten(), -infinity)).amax()
    return torch.stack((entropy.sum(), least, greatest, (~finite).sum().to(logits.dtype)))


def _assign(
    chosen_by: Tensor,
    priority: Tensor,
    finite: Tensor,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    prioritized: bool,
    groups: int,
    capacity: int,
    padded: bool,
    load_sigma: float,
) -> tuple[Tensor, ...]:
    """Everything of a route that is discrete: expert, slot, source, destination and the counts."""
    T, E = chosen_by.shape
    options = RouteOptions(
        top_k, sigmoid, normalize, prioritized, groups, capacity, padded, load_sigma
    )
    device = chosen_by.device
    # A stable sort, not topk, whose choice among equal scores is not defined.
    expert = chosen_by.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()
    group = torch.arange(T, device=device) // max(T // groups, 1)
    nowhere = groups * E
    queue = torch.where(finite[:, None], group[:, None] * E + expert, nowhere)
    slot, counts = queue_slots(queue, nowhere + 1, priority if prioritized else None)
    counts = counts[:nowhere].view(groups, E)
    used = counts.clamp(max=capacity) if capacity else counts
    total = used.sum(0)
    before = used.cumsum(0) - used  # rows of earlier groups
    start = total.cumsum(0) - total
    if padded:
        start = torch.arange(E, device=device) * (groups * capacity)
    first_row = torch.cat(((start + before).flatten(), start.new_zeros(1)))
    kept = finite[:, None].expand_as(slot)
    kept = kept & (slot < capacity) if capacity else kept
    row = torch.where(kept, first_row[queue] + slot, -1)
    rows = options.rows(T, E)
    # Dropped assignments write to one row too many, which is cut off: fixed shapes, no sync.
    source = torch.full((rows + 1,), -1, device=device, dtype=torch.int32)
    assignment = torch.arange(T * top_k, device=device, dtype=torch.int32)
    source[torch.where(kept, row, rows).flatten()] = assignment
    slot = torch.where(finite[:, None], slot, -1)
    first = torch.zeros(E + 1, dtype=torch.int64, device=device)
    choice = torch.where(finite, expert[:, 0], E)
    first.scatter_add_(0, choice, torch.ones_like(choice))
    narrow = (slot.to(torch.int32), source[:rows].clone(), row.to(torch.int32))
    return (expert, *narrow, counts.sum(0), first[:E].clone(), total)


def queue_slots(expert: Tensor, num_experts: int, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    """Place of every assignment in its expert's queue.

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


def _check(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, options: RouteOptions
) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, E], not {tuple(logits.shape)}")
    T, E = logits.shape
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, logits {tuple(logits.shape)}")
    if bias is not None and bias.shape != (E,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected [{E}]")
    if not 1 <= options.top_k <= E:
        raise ValueError(f"top_k={options.top_k} must be between 1 and the {E} experts")
    if options.capacity < 0:
        raise ValueError(f"capacity={options.capacity} must not be negative")
    if options.groups < 1 or T % options.groups:
        raise ValueError(f"{T} tokens cannot be cut into {options.groups} equal groups")
    if options.padded and not options.capacity:
        raise ValueError("padded rows need a capacity")


_OPTIONS = (
    "int top_k, bool sigmoid, bool normalize, bool prioritized, int groups, int capacity,"
    " bool padded, float load_sigma"
)
_library.declare(
    f"moe_assign(Tensor chosen_by, Tensor priority, Tensor finite, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _assign,
    internal=True,
)


@torch.library.register_fake("swin_moe::moe_assign")
def _(chosen_by: Tensor, priority: Tensor, finite: Tensor, *options: object) -> tuple[Tensor, ...]:
    T, E = chosen_by.shape
    plan = RouteOptions(*options)  # type: ignore[arg-type]

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return chosen_by.new_empty(shape, dtype=dtype)

    small, wide = torch.int32, torch.int64
    return (
        empty(wide, T, plan.top_k),
        empty(small, T, plan.top_k),
        empty(small, plan.rows(T, E)),
        empty(small, T, plan.top_k),
        *(empty(wide, E) for _ in range(3)),
    )
