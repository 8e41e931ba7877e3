"""Signals to the launcher: the ranks save, and the exit code asks for a restart or not."""

import json
import signal
import time

import pytest

from swin_moe.checkpoint import latest
from swin_moe.reporting.metric_log import read_metrics
from tests import parallel
from tests.parallel import PATIENCE, ranks, train
from tests.test_training import figures

RECIPE = ["precision.dtype=fp32", "zero.stage=2", "log.every_steps=1", "train.max_steps=60",
          "checkpoint.every_steps=1000"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals") / "undisturbed"
    done = train(folder, *RECIPE, processes=2)
    assert done.returncode == 0, done.stderr
    return folder


def start(folder, processes, *options):
    words = parallel.training(folder, *RECIPE, processes=processes)
    return parallel.start("swin_moe", *words, processes=processes, options=options)


def steps_done(folder):
    return max((record["step"] for record in read_metrics(folder)), default=0)


def wait_for_step(process, folder, step, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while steps_done(folder) < step and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGTERM, 75, "stopped by a signal at step {}; the checkpoint is written: "
         "start again to go on"),
        (signal.SIGINT, 130, "interrupted at step {}; the checkpoint is written: the same command "
         "goes on"),
    ],
)  # fmt: skip
def test_a_signal_saves_and_the_next_start_goes_on_exactly(
    undisturbed, tmp_path, number, code, message
):
    folder = tmp_path / "run"
    process = start(folder, 2, "--max-restarts", "3")
    wait_for_step(process, folder, 5)
    process.send_signal(number)
    printed, errors = process.communicate()
    assert process.returncode == code, errors
    assert "started again" not in printed
    step = json.loads((latest(folder / "checkpoints") / "state.json").read_text())["step"]
    assert 5 <= step < 60
    assert errors == f"swin-moe: error: {message.format(step)} from it\n"
    done = train(folder, *RECIPE, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step-{step:08d}" in done.stdout
    assert figures(folder) == figures(undisturbed)


def test_one_process_without_a_launcher(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, 1)
    wait_for_step(process, folder, 3)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert latest(folder / "checkpoints") is not None


def test_a_launcher_that_is_stopped_while_it_starts_asks_for_a_restart(tmp_path):
    process = start(tmp_path / "run", 2)
    while not ranks(process.pid) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate()
    assert process.returncode == 75
    assert "before the first update: nothing is lost" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run/metrics.jsonl").exists()
