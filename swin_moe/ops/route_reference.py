"""The routing of ``moe_route.py`` in PyTorch, with its options and results.

:func:`moe_route_reference` is differentiable any number of times, except for its discrete part, the
op ``moe_assign``. :func:`backward_reference` is the same derivative as a formula, for an op's own
gradient on devices without a kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .leaving import fixed, is_leaving, stable_order


class RouteOptions(NamedTuple):
    """Options of the routing, the same for every token of a call.

    Attributes:
        top_k: experts per token, 1 to E.
        sigmoid: scores are the logits' sigmoids, otherwise their softmax.
        normalize: gates are divided by their sum over the token's k choices, before drops. For
            k = 1 the gate is 1, and its gradient is that of the score's logarithm instead of zero,
            so that the router still learns from the task.
        prioritized: queue by descending best score, otherwise by index.
        groups: number of equal runs of consecutive tokens with separate queues.
        capacity: places per expert and group; 0 = unlimited (dropless).
        padded: every expert has groups · capacity rows; otherwise rows are packed.
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
        """Return the number of rows S of the experts' input; it is independent of the logits."""
        places = experts * self.groups * self.capacity
        if self.padded:
            return places
        wanted = tokens * self.top_k
        return places if self.capacity and fixed(places) < fixed(wanted) else wanted


class Route(NamedTuple):
    """The routes of T tokens with k choices each.

    ``gate``, ``sums`` and ``scalars[0]`` have gradients.

    Attributes:
        expert: [T, k] int64, best first.
        gate: [T, k] in the logits' dtype; 0 for a token that is not finite.
        slot: [T, k] int32, place in the queue of expert and group, also of dropped assignments; −1
            for a token that is not finite.
        source: [S] int32, the assignment t·k+j of each row, −1 for an empty one.
        destination: [T, k] int32, the row of each assignment, −1 for a dropped one.
        counts: [E] int64, assignments, dropped ones included.
        first: [E] int64, first choices.
        used: [E] int64, assignments that are not dropped: the rows of each expert.
        sums: [3, E], sums over tokens of the noisy probabilities, of the clean ones (importance)
            and of the load estimate, see :func:`moe_route`.
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


def moe_route_reference(
    logits: Tensor, noise: Tensor | None, bias: Tensor | None, options: RouteOptions
) -> Route:
    """Run `moe_route` in PyTorch for any float dtype, with derivatives of any order."""
    finite = logits.isfinite().all(1)
    clean = logits.masked_fill(~finite[:, None], 0.0)
    noisy = clean if noise is None else clean + noise.masked_fill(~finite[:, None], 0.0)
    scores, probabilities = _scores(noisy, options.sigmoid)
    chosen_by = scores.detach() if bias is None else scores.detach() + bias
    priority = scores.detach().amax(1)
    # An exported graph has none of our ops. Elsewhere, a recompute finds the saved route by the op.
    assign = assign_reference if is_leaving() else torch.ops.swin_moe.moe_assign
    plan = assign(chosen_by, priority, finite, *options)
    expert = plan[0]
    # The gradient is a scatter in fixed order: a token's choices are different experts.
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
    """Return scores and probabilities [T, E]."""
    if not sigmoid:
        scores = logits.softmax(1)
        return scores, scores
    scores = logits.sigmoid()
    return scores, scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps)


def _statistics(logits: Tensor, probabilities: Tensor, finite: Tensor) -> Tensor:
    """Return [4]: entropy sum, least and greatest logit, number of non-finite tokens."""
    entropy = torch.special.entr(probabilities).sum(1) * finite
    return torch.stack(
        (entropy.sum(), *finite_range(logits, finite), (~finite).sum().to(logits.dtype))
    )


def finite_range(logits: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Return least and greatest logit of the finite tokens [T]; inf and −inf without any."""
    bad = ~finite[:, None]
    infinity = logits.new_full((1,), math.inf)
    least = torch.cat((logits.masked_fill(bad, math.inf).flatten(), infinity)).amin(0)
    greatest = torch.cat((logits.masked_fill(bad, -math.inf).flatten(), -infinity)).amax(0)
    return least, greatest


def assign_reference(
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
    """Return the discrete part of a route: expert, slot, source, destination and counts."""
    T, E = chosen_by.shape
    options = RouteOptions(
        top_k, sigmoid, normalize, prioritized, groups, capacity, padded, load_sigma
    )
    device = chosen_by.device
    # A stable sort: topk's choice among equal scores is undefined.
    expert = stable_order(chosen_by, 1, descending=True)[:, :top_k].contiguous()
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
    # Dropped assignments write to an extra row, which is cut off: fixed shapes, no sync.
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
    """Return the place of every assignment in its expert's queue.

    Args:
        expert: [T, k] chosen experts.
        num_experts: E.
        priority: [T], or None for the order of the index.

    Returns:
        slot [T, k] and counts [E], both int64.
    """
    T, k = expert.shape
    device = expert.device
    order = torch.arange(T, device=device)
    if priority is not None:
        order = stable_order(priority, 0, descending=True)
    queue = expert[order].t().reshape(-1)  # [k·T], choice by choice
    by_expert = stable_order(queue, 0, descending=False)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, queue, torch.ones_like(queue))
    start = counts.cumsum(0) - counts
    place = torch.arange(k * T, device=device) - start[queue[by_expert]]
    slot = torch.empty_like(queue)
    slot[by_expert] = place
    unordered = torch.empty((T, k), dtype=torch.int64, device=device)
    unordered[order] = slot.view(k, T).t()
    return unordered, counts


def backward_reference(
    grad_gate: Tensor | None,
    grad_sums: Tensor | None,
    grad_scalars: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    expert: Tensor,
    options: RouteOptions,
) -> Tensor:
    """Return the gradient of logits [T, E] from gate, sums and scalars[0]; None means zeros.

    Args:
        expert: [T, k], the forward's choice.
    """
    finite = logits.isfinite().all(1, keepdim=True)
    clean = logits.masked_fill(~finite, 0.0)
    noisy = clean if noise is None else clean + noise.masked_fill(~finite, 0.0)
    scores = _scores(noisy, options.sigmoid)[0]
    grad = torch.zeros_like(scores)
    if grad_sums is not None:
        grad = _through_probabilities(grad_sums[:1].expand_as(scores), scores, options.sigmoid)
    if grad_gate is not None:
        grad = grad.scatter_add(1, expert, _gate_gradient(grad_gate, scores, expert, options))
    grad = _through_scores(grad, scores, options.sigmoid)
    if grad_sums is not None:
        scores, probabilities = _scores(clean, options.sigmoid)
        to_clean = grad_sums[1:2].expand_as(scores)
        if options.load_sigma > 0:
            last = expert[:, -1:]
            z = (probabilities - noisy.gather(1, last)) / (options.load_sigma * math.sqrt(2.0))
            height = 1.0 / (options.load_sigma * math.sqrt(2.0 * math.pi))
            density = grad_sums[2] * (z.square().neg().exp() * height)
            to_clean = to_clean + density
            grad = grad.scatter_add(1, last, -density.sum(1, keepdim=True))
        to_clean = _through_probabilities(to_clean, scores, options.sigmoid)
        grad = grad + _through_scores(to_clean, scores, options.sigmoid)
    if grad_scalars is not None:
        lse = clean.logsumexp(1, keepdim=True)
        grad = grad + 2.0 * grad_scalars[0] * lse * (clean - lse).exp()
    return grad.masked_fill(~finite, 0.0)


def _gate_gradient(
    grad_gate: Tensor, scores: Tensor, expert: Tensor, options: RouteOptions
) -> Tensor:
    """Return the gradient of the chosen scores [T, k]."""
    if not options.normalize:
        return grad_gate
    chosen = scores.gather(1, expert)
    total = chosen.sum(1, keepdim=True)
    least = torch.finfo(scores.dtype).eps
    divisor = total.clamp(min=least)
    if options.top_k == 1:
        return grad_gate / divisor
    shared = (grad_gate * chosen).sum(1, keepdim=True) / divisor
    return (grad_gate - shared * (total >= least)) / divisor


def _through_probabilities(grad: Tensor, scores: Tensor, sigmoid: bool) -> Tensor:
    """Return the gradient of scores from that of probabilities."""
    if not sigmoid:
        return grad
    total = scores.sum(1, keepdim=True)
    least = torch.finfo(scores.dtype).eps
    divisor = total.clamp(min=least)
    shared = (grad * scores).sum(1, keepdim=True) / divisor
    return (grad - shared * (total >= least)) / divisor


def _through_scores(grad: Tensor, scores: Tensor, sigmoid: bool) -> Tensor:
    """Return the gradient of logits from that of scores."""
    if sigmoid:
        return grad * scores * (1.0 - scores)
    return scores * (grad - (grad * scores).sum(1, keepdim=True))
