"""Routing statistics of the passes between two logs, summed on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed import all_reduce_
from .plan import RoutingStats


@dataclass(frozen=True)
class LayerTotals:
    """Statistics of one MoE layer over forward passes of all ranks, on the host; they add up.

    Attributes:
        counts: [E] assignments per expert, dropped ones included.
        tokens, offered, dropped, nonfinite, entropy, waited: see :attr:`RoutingStats.sums`.
        passes: forward passes, over all ranks.
        least, greatest: extremes of the router's logits; inf and −inf without tokens.
    """

    counts: list[int]
    tokens: float
    offered: float
    dropped: float
    nonfinite: float
    entropy: float
    waited: float
    passes: float
    least: float
    greatest: float

    def __add__(self, other: LayerTotals) -> LayerTotals:
        return LayerTotals(
            [a + b for a, b in zip(self.counts, other.counts, strict=True)],
            self.tokens + other.tokens,
            self.offered + other.offered,
            self.dropped + other.dropped,
            self.nonfinite + other.nonfinite,
            self.entropy + other.entropy,
            self.waited + other.waited,
            self.passes + other.passes,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
        )

    @property
    def load(self) -> list[float]:
        """Share of each expert, [E]; they sum to one, or are 0 without tokens."""
        total = max(sum(self.counts), 1)
        return [count / total for count in self.counts]

    @property
    def max_violation(self) -> float:
        """Greatest load divided by the even share, minus 1 (https://arxiv.org/abs/2408.15664)."""
        return max(self.load) * len(self.counts) - 1.0 if sum(self.counts) else 0.0

    @property
    def drop_rate(self) -> float:
        """Dropped assignments, in percent of the offered ones."""
        return 100.0 * self.dropped / max(self.offered, 1.0)

    @property
    def gate_entropy(self) -> float:
        """Mean entropy of a token's routing probabilities / ln E: 0 = certain, 1 = uniform."""
        whole = math.log(len(self.counts)) * (self.tokens - self.nonfinite)
        return self.entropy / whole if whole > 0 else 1.0

    @property
    def dead_experts(self) -> int:
        """Experts that no token chose."""
        return self.counts.count(0)

    def record(self, name: str) -> dict[str, Any]:
        """Return the figures under flat keys ``moe/<name>/…`` for the log."""
        figures: dict[str, Any] = {
            "load": [round(share, 5) for share in self.load],
            "max_violation": round(self.max_violation, 5),
            "drop_rate": round(self.drop_rate, 5),
            "gate_entropy": round(self.gate_entropy, 5),
            "dead_experts": self.dead_experts,
        }
        if self.least <= self.greatest:
            figures |= {"logit_min": self.least, "logit_max": self.greatest}
        if self.waited > 0:
            figures["exchange_ms"] = round(1e3 * self.waited / self.passes, 3)
        return {f"moe/{name}/{key}": value for key, value in figures.items()}


class RouterMeter:
    """Sums of the routing statistics of forward passes; the host waits only in :meth:`read`."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._counts = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._sums = torch.zeros(layers, 6, dtype=torch.float64, device=device)
        self._extremes = torch.full((layers, 2), -math.inf, device=device)
        self._passes = 0

    def update(self, stats: RoutingStats) -> None:
        """Add the statistics of one forward pass, stacked over the layers."""
        self._counts += stats.counts
        self._sums += stats.sums
        torch.maximum(self._extremes, stats.extremes, out=self._extremes)
        self._passes += 1

    def read(self) -> list[LayerTotals]:
        """Return the totals of each layer since the last call; every rank must call it."""
        layers, experts = self._counts.shape
        if layers == 0:
            return []
        # One reduction: below 2⁵³ fp64 counts exactly.
        passes = self._sums.new_full((layers, 1), self._passes)
        sums = torch.cat((self._counts.to(torch.float64), self._sums, passes), 1)
        rows: list[list[float]] = all_reduce_(sums).tolist()
        extremes: list[list[float]] = all_reduce_(self._extremes.clone(), "max").tolist()
        self._counts.zero_()
        self._sums.zero_()
        self._extremes.fill_(-math.inf)
        self._passes = 0
        return [
            LayerTotals(
                [int(n) for n in row[:experts]], *[*row[experts:], -negated_least, greatest]
            )
            for row, (greatest, negated_least) in zip(rows, extremes, strict=True)
        ]


class AssignmentCounter:
    """Assignments of one update, for :class:`~swin_moe.moe.balance.ExpertBias`."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, stats: RoutingStats) -> None:
        """Add the statistics of one micro-step, as the model returned them."""
        self._counts = stats.counts if self._counts is None else self._counts + stats.counts

    def read(self) -> Tensor:
        """Return the assignments [layers, E] since the last call; every rank must call it."""
        assert self._counts is not None
        total = all_reduce_(self._counts.clone())
        self._counts = None
        return total
