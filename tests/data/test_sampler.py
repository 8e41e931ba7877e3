import itertools

import numpy as np
import pytest

from swin_moe.data.sampler import ResumableSampler


def _sampler(num_samples, batch_size, rank=0, world_size=1, seed=0, training=True):
    return ResumableSampler(
        num_samples, batch_size, rank=rank, world_size=world_size, seed=seed, training=training
    )


def _global_order(num_samples, batch_size, world_size, epoch, training=True):
    ranks = []
    for rank in range(world_size):
        sampler = _sampler(num_samples, batch_size, rank, world_size, training=training)
        sampler.set_position(epoch, 0)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return [index for step in zip(*ranks, strict=True) for batch in step for _, index, _ in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_world_size_sees_the_same_order_once(world_size):
    whole = _global_order(101, 5, 1, epoch=3)
    order = _global_order(101, 5, world_size, epoch=3)
    assert len(order) == 101 // (5 * world_size) * 5 * world_size
    assert order == whole[: len(order)]
    assert len(set(order)) == len(order)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_keeps_order_and_pads(world_size):
    order = _global_order(37, 4, world_size, epoch=0, training=False)
    assert order[:37] == list(range(37))
    assert set(order[37:]) == {-1}
    assert len(order) % (4 * world_size) == 0


def test_order_depends_on_seed_and_epoch_only():
    orders = {
        (seed, epoch): tuple(
            index for batch in _at(_sampler(64, 8, seed=seed), epoch, 0) for _, index, _ in batch
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert tuple(i for batch in _at(_sampler(64, 8), 0, 0) for _, i, _ in batch) == orders[0, 0]


def test_order_is_fixed_for_good():
    """A checkpoint of today must resume with later versions of the libraries."""
    batch = next(iter(_sampler(10, 10)))
    assert [index for _, index, _ in batch] == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


@pytest.mark.parametrize("window", [1, 7, 16, 1000])
@pytest.mark.parametrize("runs", [[40], [5, 1, 0, 20, 14], [10] * 4])
def test_a_window_reads_few_runs_at_a_time(runs, window):
    orders = []
    for epoch in range(3):
        sampler = ResumableSampler(
            40, 4, rank=0, world_size=1, seed=0, training=True, runs=np.array(runs), window=window
        )
        order = [index for batch in _at(sampler, epoch, 0) for _, index, _ in batch]
        assert sorted(order) == list(range(40))
        run_of = np.repeat(np.arange(len(runs)), runs)
        windows = [set(run_of[order[i : i + window]]) for i in range(0, 40, window)]
        for run in set(run_of):  # each is read in one run
            where = [number for number, part in enumerate(windows) if run in part]
            assert where == list(range(where[0], where[-1] + 1))
        for this, following in itertools.pairwise(windows):
            assert len(this & following) <= 1
        orders.append(order)
    assert len({tuple(order) for order in orders}) == (3 if window > 1 or len(runs) > 1 else 1)


def test_a_window_of_all_samples_mixes_all_runs():
    sampler = ResumableSampler(
        4000, 4, rank=0, world_size=1, seed=0, training=True,
        runs=np.full(40, 100), window=4000,
    )  # fmt: skip
    order = np.array([index for batch in _at(sampler, 0, 0) for _, index, _ in batch])
    quarters = [np.bincount(part // 100, minlength=40) for part in np.split(order, 4)]
    assert min(quarter.min() for quarter in quarters) > 8  # 25 are expected


def _at(sampler, epoch, batch):
    sampler.set_position(epoch, batch)
    return list(sampler)


def test_resume_at_any_batch():
    sampler = _sampler(50, 3, rank=1, world_size=2)
    whole = _at(sampler, 2, 0)
    for start in range(len(sampler) + 1):
        assert _at(_sampler(50, 3, rank=1, world_size=2), 2, start) == whole[start:]


def test_position_beyond_the_epoch():
    with pytest.raises(ValueError, match="batch 9: an epoch has 8 batches"):
        _sampler(50, 6).set_position(0, 9)


def test_too_few_samples_for_a_global_batch():
    with pytest.raises(ValueError, match=r"7 training .* 4 per .* 2 processes = 8: lower data\."):
        _sampler(7, 4, world_size=2)
    assert len(_sampler(7, 4, world_size=2, training=False)) == 1


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation(repeats):
    sampler = ResumableSampler(
        50, 4, rank=0, world_size=1, seed=0, training=True, repeats=repeats
    )  # fmt: skip
    positions = [position for batch in _at(sampler, 1, 0) for position in batch]
    plain = [p.place for batch in _at(_sampler(50, 4), 1, 0) for p in batch]
    assert len(positions) == 48
    assert [p.place for p in positions] == np.repeat(plain, repeats)[:48].tolist()
    assert len(set(positions)) == 48  # each with its own augmentation
