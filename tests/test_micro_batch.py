"""The largest micro-batch is found by trial, and a trial that fails leaves nothing behind."""

import ast
import resource
import subprocess
import sys

import pytest
import torch

from swin_moe.config import load_config
from swin_moe.distributed import Group, World
from swin_moe.micro_batch import choose_micro_batch
from tests.parallel import MICRO, ROOT, environment, train

WORLD = World(0, 0, 1, torch.device("cpu"), Group(), Group())
MB = 10**6
N = 600 * MB


def chosen(available, *overrides):
    config = load_config(
        MICRO,
        ["train.accumulation_steps=auto", "data.batch_size=2048", "zero.stage=0",
         "precision.dtype=fp32", *overrides],
    )  # fmt: skip
    choose_micro_batch(config, WORLD, available)
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
    assert not capfd.readouterr().err  # no stacks of the trials that failed


def test_recomputing_makes_room():
    """Each in a fresh process, for what an allocator has kept is room, too."""
    sizes = []
    for on in ("false", "true"):
        code = "import sys; from tests.test_micro_batch import *; print(chosen(N, *sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, f"model.use_checkpoint={on}", "data.batch_size=2520"],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=100,
        )  # fmt: skip
        sizes.append(ast.literal_eval(done.stdout.splitlines()[-1])[0])
    assert sizes[1] > sizes[0]


def test_too_little_memory_is_told():
    with pytest.raises(ValueError, match="not even a micro-batch of 1 fits") as error:
        chosen(50 * MB, "zero.stage=1")  # DeepSpeed takes more for its buckets
    assert "model.use_checkpoint=true" in str(error.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("swin_moe.micro_batch._try", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        chosen(20_000 * MB)


def test_a_run_takes_what_fits(tmp_path):
    done = train(
        tmp_path / "run", "train.accumulation_steps=auto", "train.max_steps=1", processes=2
    )
    assert done.returncode == 0, done.stderr
    assert (
        "micro-batches of 50 images a process fit into memory: 1 of them an update" in done.stdout
    )
