"""``data.global_batch`` is the batch of an update on any number of processes."""

import re

import pytest

from swin_moe.config import load_config, micro_batches, share_global_batch
from swin_moe.launch.command import Request, check
from swin_moe.planner import Cluster
from swin_moe.planner.choices import Planner
from tests.parallel import MICRO, train

PAIRS = ["augment.mixup=0.8"]


def config(*overrides):
    return load_config(MICRO, list(overrides))  # 50 images a micro-batch


@pytest.mark.parametrize(
    ("total", "processes", "overrides", "expected"),
    [
        (400, 1, [], (50, 8)),
        (400, 4, [], (50, 2)),
        (400, 8, [], (50, 1)),
        (400, 16, [], (25, 1)),  # a share is less than a micro-batch
        (400, 2, ["train.gradient_accumulation_steps=auto"], (200, 1)),  # a start will split it
        (400, 2, PAIRS, (50, 4)),
        (10**6, 1, ["data.batch_size=1000"], (1000, 1000)),
    ],
)
def test_micro_batches_make_up_the_global_batch(total, processes, overrides, expected):
    found = config(f"data.global_batch={total}", *overrides)
    assert micro_batches(found, processes) == expected
    line = share_global_batch(found, processes)
    assert found.data.batch_size == expected[0]
    if "auto" not in str(overrides):
        assert found.train.micro_steps * found.data.batch_size * processes == total
    assert share_global_batch(found, processes) == ""  # it is done
    assert bool(line) == (expected[0] not in (50, 1000))


@pytest.mark.parametrize(
    ("total", "processes", "overrides", "said"),
    [
        (400, 3, [], "=400 cannot be cut into 3 equal parts: start 2 or 4 processes, or set "
                     "data.global_batch=399 or 402"),
        (2, 4, [], "start 2 processes, or set data.global_batch=4"),
        (400, 1, ["data.batch_size=60"], "=400 over 1 processes is 400 images each, which "
                                         "data.batch_size=60 does not divide: set data.batch_size="
                                         "50 or 80"),
        (10, 2, PAIRS, "2 equal parts of pairs, which mixup and cutmix need: start 1 or 5 "
                       "processes, or set data.global_batch=8 or 12"),
        (9, 1, PAIRS, "which mixup and cutmix need: set data.global_batch=8 or 10"),
        (36, 1, [*PAIRS, "data.batch_size=8"], "set data.batch_size=6 or 12"),
    ],
)  # fmt: skip
def test_an_impossible_batch_is_refused_with_possible_ones(total, processes, overrides, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        share_global_batch(config(f"data.global_batch={total}", *overrides), processes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], ""),
        (["train.gradient_accumulation_steps=4"], ""),
        (["train.gradient_accumulation_steps=3"], "train.gradient_accumulation_steps is 4, not 3"),
        (["train.gradient_accumulation_steps=1"], "train.gradient_accumulation_steps is 4, not 1"),
        (["train.gradient_accumulation_steps=auto"],
         "data.batch_size=50 is not used with train.gradient_accumulation_steps=auto"),
        (["data.batch_size=300"],
         "micro-batches of 200: 300 is more than the share of a process"),
    ],
)  # fmt: skip
def test_it_overrides_other_keys_and_reports_so(overrides, said):
    found = share_global_batch(config("data.global_batch=400", *overrides), 2)
    assert found == (f"data.global_batch=400 over 2 processes: {said}" if said else "")


def test_without_it_the_batch_follows_from_the_processes():
    found = config("train.gradient_accumulation_steps=3")
    assert share_global_batch(found, 7) == ""
    assert (found.data.batch_size, found.train.micro_steps) == (50, 3)


def test_plan_and_launch_know_it():
    found = config("data.global_batch=400", "moe.num_experts=4", "zero.stage=1")
    choice = Planner(found, Cluster("h100", 1, 4), fused=True).configured()
    assert (choice.images, choice.accumulation) == (50, 2)
    with pytest.raises(ValueError, match="cannot be cut into 3 equal parts"):
        Planner(found, Cluster("h100", 1, 3), fused=True).configured()
    request = Request("torchrun", str(MICRO), ["data.global_batch=400"], nodes="3",
                      gpus_per_node=1, master="localhost:29777")  # fmt: skip
    with pytest.raises(ValueError, match="cannot be cut into 3 equal parts"):
        check(request)


def test_a_resume_on_more_processes_goes_on_with_the_same_batches(tmp_path):
    options = [tmp_path / "run", "data.global_batch=100", "checkpoint.every_steps=1"]
    done = train(*options, "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"batch +100 images an update = 50 × 1 processes × 2 steps", done.stdout)
    done = train(*options, "train.max_steps=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"batch +100 images an update = 50 × 2 processes *\n", done.stdout)
    assert "resumed from step-00000001 (epoch 1, step 1)" in done.stdout
    assert "the global batch was" not in done.stdout + done.stderr
