import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from swin_moe.config import AugmentConfig
from swin_moe.data import loader as batches
from swin_moe.data.dataset import collate
from tests.parallel import PATIENCE

from .helpers import (
    NO_AUGMENT,
    encode,
    make_folder,
    make_shards,
    open_loader,
    samples,
    write_shard,
)

HEAVY = AugmentConfig(random_erase=0.5)


def _labels(path, *, epoch=1, start=0, **options):
    loader = open_loader(path, **options)
    return [batch.targets.tolist() for batch in loader.epoch(epoch, start)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_order_by_key(tmp_path, world_size, workers):
    make_shards(tmp_path, 50)
    whole = [label for batch in _labels(tmp_path) for label in batch]
    ranks = [
        _labels(tmp_path, rank=rank, world_size=world_size, num_workers=workers)
        for rank in range(world_size)
    ]
    order = [label for step in zip(*ranks, strict=True) for batch in step for label in batch]
    assert len(order) == 50 // (4 * world_size) * 4 * world_size
    assert order == whole[: len(order)]
    assert len(set(order)) == len(order)
    resumed = [
        _labels(tmp_path, rank=r, world_size=world_size, num_workers=workers, start=2)
        for r in range(world_size)
    ]
    assert resumed == [rank[2:] for rank in ranks]


def test_augmentation_is_the_same_for_any_workers_and_after_resume(tmp_path):
    make_shards(tmp_path, 24)
    plain = list(open_loader(tmp_path, HEAVY).epoch(3))
    forked = open_loader(tmp_path, HEAVY, num_workers=2)
    next(forked.epoch(7))  # an epoch that is left early must not leak into the next one
    for start in (0, 4):
        random.seed(start), np.random.seed(start), torch.manual_seed(start)
        batches = list(forked.epoch(3, start))
        assert len(batches) == len(plain) - start
        for batch, expected in zip(batches, plain[start:], strict=True):
            assert torch.equal(batch.inputs["images"], expected.inputs["images"])
            assert torch.equal(batch.targets, expected.targets)
    other = next(open_loader(tmp_path, HEAVY).epoch(4))
    assert not torch.equal(other.inputs["images"], plain[0].inputs["images"])


def test_augmentation_differs_by_epoch(tmp_path):
    write_shard(tmp_path / "train-0.tar", samples(4))
    loader = open_loader(tmp_path, HEAVY)
    first, second = (next(loader.epoch(epoch)) for epoch in (0, 1))
    a, b = (
        first.inputs["images"][first.targets.argsort()],
        second.inputs["images"][second.targets.argsort()],
    )
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_undisturbed(tmp_path, generator_states, workers):
    make_shards(tmp_path, 12)
    before = generator_states()
    loader = open_loader(tmp_path, HEAVY, num_workers=workers)
    for epoch in range(2):
        for _ in loader.epoch(epoch):
            assert generator_states() == before


def test_datasets_survive_spawn(tmp_path):
    make_shards(tmp_path, 8)
    loader = open_loader(tmp_path, HEAVY)
    expected = next(loader.epoch(0))
    copy = pickle.loads(pickle.dumps(loader.dataset))
    first = next(iter(loader.sampler))
    assert torch.equal(
        collate([copy[p] for p in first]).inputs["images"], expected.inputs["images"]
    )


def test_evaluation_covers_all_once_with_padding(tmp_path):
    make_shards(tmp_path, 10, "val")
    ranks = [
        list(
            open_loader(tmp_path, training=False, rank=r, world_size=2, eval_batch_size=3).epoch(0)
        )
        for r in range(2)
    ]
    assert [len(rank) for rank in ranks] == [2, 2]
    labels = [label for rank in ranks for batch in rank for label in batch.targets.tolist()]
    assert sorted(labels) == [-1, -1, *range(10)]
    assert {batch.inputs["images"].shape for rank in ranks for batch in rank} == {(3, 3, 16, 16)}
    assert not any(batch.skipped for rank in ranks for batch in rank)


def test_workers_outlive_the_signals_of_a_preempted_job(tmp_path):
    make_shards(tmp_path, 40)
    loader = open_loader(tmp_path, num_workers=1)
    batches = loader.epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, name)
    assert len(list(batches)) == 9
    assert worker.is_alive()
    loader.close()
    assert not worker.is_alive()
    assert len(list(loader.epoch(0))) == 10  # with new workers
    loader.close()


PROGRAM = """
import sys
from tests.data.helpers import open_loader
loader = open_loader(sys.argv[1], num_workers=2, num_classes=40)
next(loader.epoch(0))
if sys.argv[2] == "fail":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("ending", "status"), [("end", 0), ("fail", 3)])
def test_workers_do_not_delay_the_exit(tmp_path, ending, status):
    make_shards(tmp_path, 40)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), ending]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, timeout=PATIENCE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")


# ---------------------------------------------------------------------------------------------
# Unreadable images


def _with_faults(tmp_path, bad, split="train"):
    content = [
        (key, b"no image" if n in bad else png, n) for n, (key, png, _) in enumerate(samples(12))
    ]
    if 5 in bad:  # truncated half-way
        content[5] = ("key0005", encode(5, size=64, extension="jpg")[:900], 5)
    write_shard(tmp_path / f"{split}-0.tar", content)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_unreadable_images(tmp_path, workers, caplog):
    bad = {2, 5, 6}
    _with_faults(tmp_path, bad)
    loader = open_loader(tmp_path, num_workers=workers)
    whole = list(loader.epoch(0))
    assert loader.bad.total == len(bad)
    order = [index for batch in loader.sampler for _, index, _ in batch]
    for number, batch in enumerate(whole):
        wanted = order[4 * number : 4 * number + 4]
        for place in range(4):
            stand_in = next(
                wanted[(place + k) % 4] for k in range(4) if wanted[(place + k) % 4] not in bad
            )
            assert batch.targets[place] == stand_in
        assert batch.inputs["images"].shape == (4, 3, 16, 16)
        assert all(batch.inputs["images"].flatten(1).float().std(1) > 0.1)
    keys = sorted(s.key.split(":")[-1] for batch in whole for s in batch.skipped)
    assert keys == ["key0002", "key0005", "key0006"]
    assert all(key in caplog.text for key in keys)


def test_evaluation_marks_unreadable_images(tmp_path):
    _with_faults(tmp_path, {2, 5, 6}, "val")
    loader = open_loader(tmp_path, training=False)
    batches = list(loader.epoch(0))
    assert torch.cat([b.targets for b in batches]).tolist() == [
        0,
        1,
        -1,
        3,
        4,
        -1,
        -1,
        7,
        8,
        9,
        10,
        11,
    ]
    assert not batches[0].inputs["images"][2].any()
    assert loader.bad.total == 3
    reasons = [s.reason for batch in batches for s in batch.skipped]
    assert len(reasons) == 3
    assert "truncated" in reasons[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wholly_unreadable_batch_is_an_error_in_training(tmp_path, workers):
    _with_faults(tmp_path, range(12), "train")
    loader = open_loader(tmp_path, num_workers=workers)
    with pytest.raises(
        ValueError, match=r"^none of 12 training images can .*key00\d\d \("
    ) as error:
        list(loader.epoch(0))
    assert "\n" not in str(error.value)
    loader.close()


def test_a_wholly_unreadable_batch_counts_nowhere_in_evaluation(tmp_path):
    _with_faults(tmp_path, range(12), "val")
    batches = list(open_loader(tmp_path, training=False).epoch(0))
    assert sum(len(batch.skipped) for batch in batches) == 12
    assert all((batch.targets == -1).all() for batch in batches)


# ---------------------------------------------------------------------------------------------
# Image folders


def test_image_folder(tmp_path):
    make_folder(tmp_path / "train", ["cat", "dog"], per_class=6)
    make_folder(tmp_path / "val", ["cat", "dog"], per_class=3)
    loader = open_loader(tmp_path, NO_AUGMENT, num_classes=2)
    assert (loader.num_samples, len(loader), loader.class_names) == (12, 3, ["cat", "dog"])
    assert sum(int(batch.targets.sum()) for batch in loader.epoch(0)) == 6
    val = open_loader(tmp_path, training=False, num_classes=2)
    assert [b.targets.tolist() for b in val.epoch(0)] == [[0, 0, 0, 1], [1, 1, -1, -1]]
    assert "6 samples, 2 classes, image folder" in val.description


def test_image_folder_with_a_corrupt_file(tmp_path):
    folder = make_folder(tmp_path / "train", ["a", "b"])
    (folder / "a" / "0.png").write_bytes(encode(0)[:60])
    (batch,) = open_loader(tmp_path).epoch(0)
    assert [s.key for s in batch.skipped] == [str(folder / "a" / "0.png")]


# ---------------------------------------------------------------------------------------------
# Data that cannot be used


def _raises(pattern, *arguments, **options):
    with pytest.raises(ValueError, match=pattern) as error:
        open_loader(*arguments, **options)
    assert "\n" not in str(error.value)


def test_missing_path(tmp_path):
    _raises(rf"data\.path={re.escape(str(tmp_path))}/none: no such folder", tmp_path / "none")


def test_missing_split(tmp_path):
    make_shards(tmp_path, 4)
    _raises(
        r"data\.val=val: found no .*/val, and no shards .*/val-\*\.tar", tmp_path, training=False
    )
    _raises(r"data\.train=x-\*\.tar: found no", tmp_path, train="x-*.tar")
    _raises(r"data\.train=.*: .*/train-2\.tar: no such shard", tmp_path, train="train-{0..2}.tar")


def test_empty_shards(tmp_path):
    write_shard(tmp_path / "train-0.tar", [])
    _raises(r"data\.train=train: .* holds no images", tmp_path)


def test_empty_class_folders(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    _raises(r"data\.train=train: .*train holds no images", tmp_path)


def test_flat_validation_folder(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "1.png").write_bytes(encode(0))
    _raises(r"data\.val=val: .*/val has no class folders: sort", tmp_path, training=False)


def test_differing_classes(tmp_path):
    make_folder(tmp_path / "train", ["a", "b", "c"])
    make_folder(tmp_path / "val", ["a", "c"])
    _raises(
        r"data\.val=val: .*/val and .*/train differ in 1 class folders, first 'b'",
        tmp_path,
        training=False,
    )


def test_more_classes_than_the_model(tmp_path):
    make_folder(tmp_path / "train", ["a", "b", "c"])
    _raises(r"c/0\.png is 2, not in \[0, 2\): .* model\.num_classes=3", tmp_path, num_classes=2)
    make_shards(tmp_path / "tar", 8)
    _raises(r"train-0\.tar:key0003 is 3, not in \[0, 3\)", tmp_path / "tar", num_classes=3)


def test_empty_classes_are_reported(tmp_path, caplog):
    folder = make_folder(tmp_path / "train", ["a", "b", "c"], per_class=4)
    (folder / "yak").mkdir()
    open_loader(tmp_path, num_classes=4)
    assert "data.train=train: 1 of 4 classes have no sample, first 'yak': fill" in caplog.text
    caplog.clear()
    open_loader(tmp_path, num_classes=4, rank=1, world_size=2)
    open_loader(tmp_path, num_classes=0, train="train")
    assert caplog.text.count("classes have no sample") == 1
    caplog.clear()
    make_shards(tmp_path / "tar", 8)
    open_loader(tmp_path / "tar", num_classes=9)
    assert "1 of 9 classes have no sample, first 8: fill" in caplog.text


def test_a_model_without_a_head_takes_any_label(tmp_path):
    make_shards(tmp_path, 8)
    assert len(open_loader(tmp_path, num_classes=0)) == 2


def test_truncated_shard_names_the_key(tmp_path):
    make_shards(tmp_path, 8)
    path = tmp_path / "train-1.tar"
    path.write_bytes(path.read_bytes()[:3000])
    _raises(r"data\.train=train: .*train-1\.tar: the shard is truncated", tmp_path)


def test_too_few_samples(tmp_path):
    make_shards(tmp_path, 5)
    _raises(r"5 training samples .* = 8: lower data\.batch_size", tmp_path, world_size=2)


def test_shards_by_brace_range_and_other_prefix(tmp_path):
    make_shards(tmp_path, 12, "my-train", shards=3)
    assert open_loader(tmp_path, train="my-train").num_samples == 12
    assert open_loader(tmp_path, train="my-train-{0..1}.tar").num_samples == 8
    assert open_loader(tmp_path, train="my-*-2.tar").num_samples == 4


def test_too_little_shared_memory_is_one_line_before_any_worker_starts(monkeypatch):
    monkeypatch.setattr(batches, "_free_shared_memory", lambda: 1_000_000)
    batches.check_shared_memory(2, 250_000, "train")
    batches.check_shared_memory(0, 10**9, "train")
    with pytest.raises(ValueError, match="--shm-size") as error:
        batches.check_shared_memory(2, 250_001, "train")
    assert str(error.value) == (
        "train: /dev/shm has 1.0 MB of shared memory free, but data.num_workers=2 may take 1.0 MB "
        "(2 workers, 2 batches of 0.3 MB each): start the container with a larger --shm-size, or "
        "lower data.num_workers (0 needs none) or the batch"
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="2 workers of each of 4 processes, 2 batches"):
        batches.check_shared_memory(2, 100_000, "train")
    monkeypatch.setattr(batches, "_free_shared_memory", lambda: None)
    batches.check_shared_memory(2, 10**9, "train")


def test_a_worker_that_died_is_explained(monkeypatch):
    monkeypatch.setattr(batches, "_free_shared_memory", lambda: 1_000_000)
    assert batches.why_died(RuntimeError("something else")) == ""
    error = RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")
    assert batches.why_died(error).startswith("a worker of the data loader died (DataLoader worker")
    cause = f"DataLoader worker (pid 1) exited unexpectedly with exit code {batches._NO_ROOM}. More"
    error.__cause__ = RuntimeError(cause)
    assert batches.why_died(error) == (
        "a worker of the data loader found no room for a batch in /dev/shm (1.0 MB are free "
        "there): start the container with a larger --shm-size, or lower data.num_workers or the "
        "batch"
    )
    error.__cause__ = RuntimeError(cause.replace(str(batches._NO_ROOM), str(batches._NO_FILES)))
    assert "may open no more files: raise the limit (ulimit -n)" in batches.why_died(error)
    bus = RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible")
    assert "no room for a batch in /dev/shm" in batches.why_died(bus)
