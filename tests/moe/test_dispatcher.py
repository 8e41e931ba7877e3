"""What the exchange of a padded plan costs on the host and on the device, in one process.

The collectives are stand-ins: the other rank sends what this one sends.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe.config import MoEConfig
from swin_moe.distributed import Group
from swin_moe.moe import build_moe
from swin_moe.moe.schedule import Maps, Schedule, Schedules, Transposition

PAIR = Group(None, 0, 2)
CPU = torch.device("cpu")


class Work:
    def wait(self):
        pass


@pytest.fixture
def collectives(monkeypatch):
    """Count stand-ins of the collectives by name."""
    counts = Counter()

    def all_gather(out, mine, group):
        counts["lengths"] += 1
        out.copy_(mine.repeat(2))

    def all_to_all(out, x, by, to, group, async_op):
        counts["rows"] += 1
        out.copy_(x) if out.shape == x.shape else out.zero_()
        return Work()

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", all_gather)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", all_to_all)
    return counts


class Launches(TorchDispatchMode):
    """Counts the ops that run on a device: not views, and none that only allocate."""

    FREE = ("view", "detach", "transpose", "empty", "split", "select", "slice", "alias", "permute",
            "_reshape_alias", "_unsafe_view", "unsqueeze", "expand", "unbind", "new_empty",
            "t.default", "profiler")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def make(equal_tokens, padded=True, **moe):
    torch.manual_seed(0)
    layer = build_moe(
        8, 12, MoEConfig(num_experts=4, gate_noise=0.0, balance="gshard", **moe), PAIR
    )
    layer.padded, layer.schedules.equal_tokens = padded, equal_tokens
    return layer


def step(layer):
    x = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer.zero_grad()
    with Launches() as launches:
        layer(x).output.square().sum().backward()
    return launches.seen


def test_equal_lengths_are_exchanged_once(collectives):
    for equal, wanted in ((False, 3), (True, 1)):
        layer = make(equal)
        collectives.clear()
        for _ in range(3):
            step(layer)
        assert collectives == {"lengths": wanted, "rows": 3 * 4}


def test_a_packed_plan_always_exchanges_its_lengths(collectives):
    layer = make(True, padded=False, capacity_factor=0.0)
    for _ in range(3):
        step(layer)
    assert collectives["lengths"] == 3


@pytest.mark.parametrize("degree", [1, 3])
def test_a_kept_schedule_launches_nothing_but_the_experts_and_copies(collectives, degree):
    first, later = (make(equal, overlap_degree=degree) for equal in (False, True))
    step(later)
    each_pass, kept = step(first), step(later)
    gone = each_pass - kept
    assert not kept - each_pass
    made = ("cumsum.default", "full.default", "diff.default", "floor_divide.default")
    assert sum(each_pass[name] for name in made) > 0
    assert not any(kept[name] for name in made), kept
    assert gone.total() > 15 * degree, gone


def test_rows_of_equal_runs_are_sorted_by_one_copy():
    even = torch.full((2, 6), 2)
    (order,) = Schedule(even, 12, PAIR, 1, CPU).arrived
    assert isinstance(order, Transposition)
    uneven = even.clone()
    uneven[0, 1] = 1
    (maps,) = Schedule(uneven, 12, PAIR, 1, CPU).arrived
    assert isinstance(maps, Maps)
    rows = torch.arange(24.0).view(12, 2)
    kernels = make(False).kernels
    with Launches() as launches:
        found = order.apply(rows, kernels)
    assert launches.seen.total() == 1
    # From each of two ranks came two rows of each of three experts.
    assert found[:, 0].tolist() == [0, 2, 12, 14, 4, 6, 16, 18, 8, 10, 20, 22]
    assert torch.equal(order.invert(found, kernels), rows)


def test_unequal_lengths_are_refused(monkeypatch):
    def all_gather(out, mine, group):
        out.copy_(torch.cat((mine, mine + 1)))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", all_gather)
    schedules = Schedules(PAIR)
    schedules.equal_tokens = True
    layer = make(True)
    plan = layer.route(torch.randn(32, 8)).plan
    with pytest.raises(ValueError, match=r"10 places on rank 0 .* 11 on rank 1"):
        schedules.find(plan, 32, 1)
