"""The order of samples by their keys: every world, any workers, resumed anywhere."""

import itertools
import random

import pytest

from .helpers import make_shards, open_loader

SAMPLES, BATCH, EPOCHS = 77, 3, 3
WORLDS, WORKERS = (1, 2, 3, 4), (0, 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("order"), SAMPLES, shards=5)


def _keys(loader, epoch, start=0):
    return [loader.keys(batch) for batch in loader.epoch(epoch, start)]


def _whole(loaders, epoch):
    """Return the job's order: in each step, the ranks' batches in turn."""
    steps = zip(*(_keys(loader, epoch) for loader in loaders), strict=True)
    return [key for step in steps for batch in step for key in batch]


@pytest.fixture(scope="module")
def expected(shards):
    """Return all keys of each epoch, as one process with batches of one reads them."""
    loader = open_loader(shards, batch_size=1)
    return [[key for (key,) in _keys(loader, epoch)] for epoch in range(EPOCHS)]


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(expected):
    assert [len(set(keys)) for keys in expected] == [SAMPLES] * EPOCHS
    for one, other in itertools.combinations(expected, 2):
        assert sorted(one) == sorted(other)
        assert sum(a == b for a, b in zip(one, other, strict=True)) < SAMPLES // 8


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", WORLDS)
def test_order(shards, expected, world, workers, window):
    if window:
        loader = open_loader(shards, batch_size=1, shuffle_window=window)
        expected = [[key for (key,) in _keys(loader, epoch)] for epoch in range(EPOCHS)]
    loaders = [
        open_loader(
            shards, batch_size=BATCH, rank=rank, world_size=world, num_workers=workers,
            shuffle_window=window,
        )
        for rank in range(world)
    ]  # fmt: skip
    steps = SAMPLES // (BATCH * world)
    draw = random.Random(f"{world} {workers} {window}")
    for epoch in range(EPOCHS):
        assert _whole(loaders, epoch) == expected[epoch][: steps * BATCH * world]
        for start in draw.sample(range(steps + 1), 3):  # resumed, as by a new process
            for rank, loader in enumerate(loaders):
                assert _keys(loader, epoch, start) == [
                    expected[epoch][(step * world + rank) * BATCH :][:BATCH]
                    for step in range(start, steps)
                ]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(("before", "after"), itertools.permutations(WORLDS, 2))
def test_resume_on_another_world(shards, expected, before, after):
    """With the same global batch, another number of processes continues with the same samples."""
    batch = 12
    steps = SAMPLES // batch
    taken = []
    for world, part in ((before, range(2)), (after, range(2, steps))):
        loaders = [
            open_loader(shards, batch_size=batch // world, rank=rank, world_size=world)
            for rank in range(world)
        ]
        runs = [loader.epoch(1, part.start) for loader in loaders]
        taken += [
            key
            for _ in part
            for loader, run in zip(loaders, runs, strict=True)
            for key in loader.keys(next(run))
        ]
    assert taken == expected[1][: steps * batch]
