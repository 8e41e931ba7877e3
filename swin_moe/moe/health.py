"""Warnings about unhealthy routers, with advice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..config import MoEConfig
from .meter import LayerTotals

TOKENS_PER_EXPERT = 32  # needed for a judgement: shorter intervals are joined
STREAK = 3  # intervals in a row with a symptom before a warning: routers wobble at first
REPEAT = 50  # intervals until a warning is repeated, unless its severity has grown by WORSE
WORSE = 0.1
CERTAIN = 0.02  # entropy divided by its maximum
DROPPED = {"token_choice": 20.0, "expert_choice": 50.0, "soft": 100.0}  # percent
WIDE_LOGITS = 30.0  # range of logits over which a softmax is a hard choice


def lost_gate(moe: MoEConfig, post_norm: bool) -> str:
    """Return a warning if the norm after the experts cancels a token's only gate, otherwise "".

    LayerNorm cancels a positive factor, so the task's loss hardly reaches the router.
    """
    alone = moe.routing == "token_choice" and moe.top_k == 1 and not moe.num_shared_experts
    if not (moe.enabled and post_norm and alone) or moe.gate_after_norm or moe.num_experts == 1:
        return ""
    return (
        "moe.gate_after_norm=false: the norm after the experts cancels a token's only gate "
        "(moe.top_k=1), and the router learns from its balance loss alone; start new runs with "
        "moe.gate_after_norm=true"
    )


class Symptom(NamedTuple):
    """A fault of a layer; ``severity`` is between 0 and 1."""

    kind: str
    severity: float
    text: str


def symptoms(totals: LayerTotals, routing: str = "token_choice") -> list[Symptom]:
    """Return the faults that the totals of one interval show.

    A router has collapsed in three cases: more than half of its experts got no token; one expert
    takes more than halfway between an even share of the tokens and all of them; or its entropy is
    below ``CERTAIN`` and one expert has over twice the even load.
    """
    found = []
    experts, load = len(totals.counts), totals.load
    even = sum(totals.counts) / max(totals.tokens, 1.0) / experts  # share of the tokens
    busiest = max(range(experts), key=load.__getitem__)
    taken = totals.counts[busiest] / max(totals.tokens, 1.0)
    excess = (taken - even) / (1.0 - even) if even < 1.0 else 0.0
    seen = []
    if 2 * totals.dead_experts > experts:
        seen.append(f"{totals.dead_experts} of {experts} experts got no token")
    if excess > 0.5:
        seen.append(f"expert {busiest} takes {100 * taken:.0f} % of the tokens")
    if not seen and totals.gate_entropy < CERTAIN and totals.max_violation > 1.0:
        seen.append(
            f"its choices are all but certain (entropy {totals.gate_entropy:.3f} of 1), and expert "
            f"{busiest} has {load[busiest] * experts:.1f} times the even load"
        )
    if seen:
        severity = max(totals.dead_experts / experts, excess)
        found.append(Symptom("collapse", severity, f"the router collapses: {', '.join(seen)}"))
    if totals.drop_rate > DROPPED[routing]:
        text = f"{totals.drop_rate:.0f} % of the assignments are dropped"
        found.append(Symptom("drops", totals.drop_rate / 100.0, text))
    return found


def advice(kind: str, totals: LayerTotals, moe: MoEConfig) -> str:
    """Return the settings to change, the most promising first."""
    even = _balance_advice(moe)
    if kind == "drops":
        uneven = totals.max_violation > moe.capacity_factor > 0
        more = f"raise moe.capacity_factor from {moe.capacity_factor:g}"
        steps = [even, more] if uneven and even else [more, even]
    else:
        steps = [even]
        if moe.routing == "token_choice" and moe.gate_noise == 0 and moe.score == "softmax":
            steps.append("add moe.gate_noise=1")
        if totals.greatest - totals.least > WIDE_LOGITS and moe.routing != "soft":
            now = f"raise moe.z_loss_weight from {moe.z_loss_weight:g}"
            what = now if moe.z_loss_weight else "add moe.z_loss_weight=0.001"
            steps.append(f"{what}, as its logits span {totals.greatest - totals.least:.0f}")
        steps.append("lower optimizer.base_lr")
    return ", or ".join(step for step in steps if step)


def _balance_advice(moe: MoEConfig) -> str:
    if moe.routing != "token_choice":
        return ""
    if moe.expert_bias_update_rate:
        return f"raise moe.expert_bias_update_rate from {moe.expert_bias_update_rate:g}"
    if moe.balance == "none":
        return "set moe.balance=gshard"
    return f"raise moe.aux_loss_weight from {moe.layer_aux_loss_weight:g}"


@dataclass
class _Case:
    """The history of one kind of symptom of one layer."""

    streak: int = 0
    quiet: int = REPEAT  # intervals since its last warning
    reported: float = -1.0  # severity in its last warning

    def is_due(self, severity: float | None) -> bool:
        """Add one interval and return whether to warn now.

        Args:
            severity: None if the symptom was absent.
        """
        self.quiet += 1
        self.streak = 0 if severity is None else self.streak + 1
        if severity is None or self.streak < STREAK:
            return False
        if self.quiet < REPEAT and severity < self.reported + WORSE:
            return False
        self.quiet, self.reported = 0, severity
        return True


class RouterWatch:
    """A source of rare warnings of layers whose totals show a symptom."""

    def __init__(self, names: list[str], layers: list[MoEConfig]) -> None:
        self.names, self.layers = names, layers
        self._joined: list[LayerTotals | None] = [None] * len(names)
        self._cases: dict[tuple[int, str], _Case] = {}

    def check(self, totals: list[LayerTotals]) -> list[str]:
        """Return a warning of one line for each layer and symptom that is due."""
        return [line for index, layer in enumerate(totals) for line in self._check(index, layer)]

    def _check(self, index: int, latest: LayerTotals) -> list[str]:
        before = self._joined[index]
        layer = latest if before is None else before + latest
        if layer.tokens < TOKENS_PER_EXPERT * len(layer.counts):
            self._joined[index] = layer
            return []
        self._joined[index] = None
        moe, lines = self.layers[index], []
        found = {symptom.kind: symptom for symptom in symptoms(layer, moe.routing)}
        for kind in ("collapse", "drops"):
            case = self._cases.setdefault((index, kind), _Case())
            symptom = found.get(kind)
            if case.is_due(None if symptom is None else symptom.severity):
                assert symptom is not None
                what = f"{self.names[index]}: {symptom.text}"
                lines.append(f"{what} ({advice(kind, layer, moe)})")
        return lines
