"""The largest micro-batch is found by trial, and a failed trial has no side effects."""

import resource

import pytest
import torch

from swin_moe.config import load_config
from swin_moe.distributed import Group, World
from swin_moe.tasks import build_task
from swin_moe.training.auto_batch import choose_micro_batch, largest_that_fits
from tests.parallel import MICRO, train

WORLD = World(0, 0, 1, torch.device("cpu"), Group(), Group())
MB = 10**6


def chosen(available, *overrides):
    config = load_config(
        MICRO,
        ["train.gradient_accumulation_steps=auto", "data.batch_size=2048", "zero.stage=0",
         "precision.dtype=fp32", *overrides],
    )  # fmt: skip
    choose_micro_batch(build_task(config), WORLD, available)
    return config.data.batch_size, config.train.micro_steps


def test_micro_batches_shrink_with_the_memory_and_make_up_the_same_update(capfd):
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    state = torch.get_rng_state()
    found = [chosen(available * MB) for available in (300, 700, 20_000)]
    assert all(size * steps == 2048 for size, steps in found)
    sizes = [size for size, _ in found]
    assert sizes[2] == 2048
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    assert torch.equal(torch.get_rng_state(), state)
    assert not capfd.readouterr().err  # no stacks of failed trials


def test_recomputing_makes_room():
    deep = ["model.depths=[20,2,2]", "data.batch_size=5040"]  # 24 images, or else 56
    sizes = [chosen(300 * MB, f"model.use_checkpoint={on}", *deep)[0] for on in ("false", "true")]
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize("available", [430, 520])
def test_bf16_in_which_onednn_runs_out_of_memory(available):
    """oneDNN has its own message for it, and does not recover in that process."""
    size, steps = chosen(
        available * MB, "data.batch_size=512", "zero.stage=2", "precision.dtype=bf16"
    )
    assert size > 0
    assert size * steps == 512


def test_too_little_memory_is_reported():
    with pytest.raises(ValueError, match="not even a micro-batch of 1 fits") as error:
        chosen(50 * MB, "zero.stage=1")  # DeepSpeed needs more for its buckets
    assert "model.use_checkpoint=true" in str(error.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(ValueError, match=r"the trial failed: .*tutel"):
        chosen(20_000 * MB, "moe.backend=tutel")


@pytest.mark.parametrize(("room", "expected"), [(9, 8), (8, 8), (7, 4), (3, 2), (1, 1), (0, 0)])
def test_the_largest_that_fits_is_found(room, expected):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= room

    assert largest_that_fits([8, 4, 2, 1], fits) == expected
    assert tried[0] == 8


def test_a_run_takes_what_fits_and_a_resume_keeps_it(tmp_path):
    options = [
        tmp_path / "run",
        "train.gradient_accumulation_steps=auto",
        "checkpoint.every_steps=1",
    ]
    done = train(*options, "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert (
        "micro-batches of 50 images a process fit into memory: 1 of them an update" in done.stdout
    )
    done = train(*options, "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert "fit into memory" not in done.stdout
