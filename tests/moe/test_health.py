"""What the routers did, added up and judged: figures, symptoms, and warnings that are rare."""

import math

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe import LayerTotals, RoutingStats
from swin_moe.moe.health import REPEAT, STREAK, RouterWatch, symptoms
from swin_moe.moe.meter import AssignmentCounter, RouterMeter

NAMES = ["layers.1.blocks.1"]
MOE = MoEConfig(blocks=[[], [1]], num_experts=8, balance="gshard", capacity_factor=1.25)
EVEN = [125] * 8
CPU = torch.device("cpu")


def totals(counts, entropy=0.5, dropped=0.0, least=-1.0, greatest=1.0, top_k=1):
    """An interval in which every token found its experts; entropy is a share of ln E."""
    tokens = sum(counts) / top_k
    whole = entropy * math.log(len(counts)) * tokens
    return LayerTotals(
        counts, tokens, sum(counts), dropped * sum(counts), 0.0, whole, 0.0, 1.0, least, greatest
    )


def stats(counts, sums, extremes):
    double = torch.float64
    return RoutingStats(
        torch.tensor(counts), torch.tensor(sums, dtype=double), torch.tensor(extremes)
    )


def test_a_meter_adds_up_takes_extremes_and_starts_anew():
    meter = RouterMeter(2, 2, CPU)
    one = stats([[3, 1], [0, 4]], [[4, 4, 1, 0, 2.0, 0.25], [4, 4, 0, 1, 0.0, 0.0]],
                [[2.0, 1.0], [0.5, 0.25]])  # fmt: skip
    two = stats([[3, 1], [0, 4]], [[4, 4, 1, 0, 2.0, 0.25], [4, 4, 0, 1, 0.0, 0.0]],
                [[1.0, 3.0], [0.75, 0.5]])  # fmt: skip
    meter.update(one)
    meter.update(two)
    first, second = meter.read()
    assert first.record("a") == {
        "moe/a/load": [0.75, 0.25],
        "moe/a/max_violation": 0.5,
        "moe/a/drop_rate": 25.0,
        "moe/a/gate_entropy": round(4.0 / (8 * math.log(2)), 5),
        "moe/a/dead_experts": 0,
        "moe/a/logit_min": -3.0,
        "moe/a/logit_max": 2.0,
        "moe/a/exchange_ms": 250.0,
    }
    record = second.record("b")
    assert record["moe/b/dead_experts"] == 1
    assert record["moe/b/max_violation"] == 1.0
    assert record["moe/b/gate_entropy"] == 0.0
    assert second.nonfinite == 2
    assert "moe/b/exchange_ms" not in record  # nobody was waited for
    empty = meter.read()[0]
    assert empty.tokens == 0
    assert "moe/a/logit_max" not in empty.record("a")  # JSON has no infinity
    assert RouterMeter(0, 8, CPU).read() == []


def test_totals_of_two_intervals_are_those_of_both():
    both = totals([3, 1], least=-2.0) + totals([1, 5], greatest=4.0)
    assert both.counts == [4, 6]
    assert both.tokens == 10
    assert both.gate_entropy == pytest.approx(0.5)
    assert (both.least, both.greatest) == (-2.0, 4.0)


def test_choices_of_all_micro_steps_are_counted_once():
    counter = AssignmentCounter()
    for _ in range(2):
        counter.update(stats([[1, 2]], [[0.0] * 6], [[0.0, 0.0]]))
    assert counter.read().tolist() == [[2, 4]]
    counter.update(stats([[1, 2]], [[0.0] * 6], [[0.0, 0.0]]))
    assert counter.read().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (totals(EVEN), ""),
        (totals([250] * 4 + [0] * 4), ""),  # half of the experts dead: not yet a collapse
        (totals([300] * 3 + [0] * 5), "5 of 8 experts got no token"),
        (totals([600] + [60] * 7), "expert 0 takes 59 % of the tokens"),
        (totals([500] + [500] + [10] * 6), ""),  # uneven, yet far from one taking all
        (totals([400] + [100] * 7, entropy=0.01), "all but certain (entropy 0.010 of 1)"),
        (totals(EVEN, entropy=0.01), ""),  # certain and even: a router that has learned
        (totals([60, 940]), "expert 1 takes 94 % of the tokens"),
        (totals([1000]), ""),  # one expert cannot but take all
        (totals([500, 500] + [10] * 6, top_k=2), "expert 0 takes 94 % of the tokens"),
        (totals(EVEN, dropped=0.25), "25 % of the assignments find no place"),
    ],
)  # fmt: skip
def test_symptoms(interval, expected):
    found = symptoms(interval)
    if not expected:
        assert found == []
    else:
        assert [expected in one.text for one in found] == [True]


def test_experts_that_choose_may_leave_out_more_tokens():
    assert symptoms(totals(EVEN, dropped=0.4), "expert_choice") == []
    assert symptoms(totals(EVEN, dropped=0.6), "expert_choice")


def test_a_warning_waits_for_a_streak_and_is_told_again_only_if_worse():
    watch = RouterWatch(NAMES, [MOE])
    bad, good = [totals([700, 200, 100] + [0] * 5)], [totals(EVEN)]
    for interval in [bad, bad, good, *[bad] * (STREAK - 1)]:
        assert watch.check(interval) == []
    (line,) = watch.check(bad)
    assert line == (
        "layers.1.blocks.1: the router collapses: 5 of 8 experts got no token, expert 0 takes 70 % "
        "of the tokens (raise moe.aux_loss_weight from 0.01, or lower optimizer.base_lr)"
    )
    assert [watch.check(bad) for _ in range(5)] == [[]] * 5
    (worse,) = watch.check([totals([1000] + [0] * 7)])
    assert "7 of 8" in worse
    told = sum(len(watch.check(bad)) for _ in range(2 * REPEAT))
    assert told == 2


def test_small_intervals_are_joined_until_they_say_something():
    watch = RouterWatch(NAMES, [MOE])
    told = [len(watch.check([totals([64] + [0] * 7)])) for _ in range(4 * STREAK)]
    assert told == [0] * (4 * STREAK - 1) + [1]  # 4 of them make 32 · 8 tokens


def test_advice_follows_the_configuration():
    collapsed = [totals([1000] + [0] * 7, least=-40.0, greatest=35.0)]

    def told(interval=collapsed, **changes):
        watch = RouterWatch(NAMES, [MOE.model_copy(update=changes)])
        return next(line for _ in range(STREAK) for line in watch.check(interval))

    assert "add moe.z_loss_weight=0.001, as its logits span 75" in told()
    assert "raise moe.z_loss_weight from 0.1" in told(z_loss_weight=0.1)
    assert "raise moe.expert_bias_update_rate from 0.001" in told(expert_bias_update_rate=0.001)
    assert "set moe.balance=gshard" in told(balance="none")
    assert "add moe.gate_noise=1" in told(gate_noise=0.0)
    even = [totals(EVEN, dropped=0.3)]
    assert told(even).endswith(
        "(raise moe.capacity_factor from 1.25, or raise moe.aux_loss_weight from 0.01)"
    )
    uneven = [totals([500] + [70] * 7, dropped=0.3)]
    assert "(raise moe.aux_loss_weight from 0.01, or raise moe.capacity_factor" in told(uneven)
    assert "balance" not in told([totals(EVEN, dropped=0.6)], routing="expert_choice")
