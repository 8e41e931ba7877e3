"""A full disk is reported, training goes on, and the former checkpoint stays whole."""

import os
import subprocess

import pytest

from swin_moe.checkpoint import latest
from swin_moe.reporting.metric_log import read_metrics
from tests.parallel import one_error, train

RECIPE = ["precision.dtype=fp32", "zero.stage=1", "log.every_steps=1", "train.max_steps=12",
          "checkpoint.every_steps=4", "checkpoint.keep_last=1", "model.embed_dim=32"]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB: room for one checkpoint and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root; a full disk is simulated in test_checkpoint.py")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_neither_training_nor_a_later_start(small_disk):
    folder = small_disk / "run"
    done = train(folder, *RECIPE, processes=2)
    assert done.returncode == 1
    assert "warning: the checkpoint of step 8 could not be written" in done.stdout
    assert "No space left on device" in done.stdout
    assert "the last checkpoint could not be written" in one_error(done)
    assert [r["step"] for r in read_metrics(folder) if "train/loss" in r] == list(range(1, 13))
    assert latest(folder / "checkpoints").name == "step-00000004"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = train(folder, *RECIPE, processes=2)
    assert done.returncode == 0, done.stderr
    assert "resumed from step-00000004" in done.stdout
    assert latest(folder / "checkpoints").name == "step-00000012"
