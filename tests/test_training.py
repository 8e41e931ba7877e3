"""Whole runs in fresh processes: train, evaluate, kill, resume."""

import fcntl
import json
import re
import shutil
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swin_moe.checkpoint import list_checkpoints
from swin_moe.checkpoint.folder import read_manifest
from swin_moe.reporting.metric_log import read_metrics
from swin_moe.reporting.tables import Result, closing
from swin_moe.tasks import Metric
from swin_moe.training.progress import Position, TrainingPlan
from tests.parallel import PATIENCE, one_error, start, swin_moe, train, training

RECIPE = ["precision.dtype=fp32", "zero.stage=2", "log.every_steps=1", "train.max_steps=60",
          "checkpoint.every_steps=20", "checkpoint.keep_last=3"]  # fmt: skip


def figures(folder):
    """Return the records without speed and time; they must repeat exactly."""
    return [
        {
            key: value
            for key, value in record.items()
            if not key.endswith(("images_per_second", "exchange_ms", "data_wait_ms"))
        }
        for record in read_metrics(folder)
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = train(folder, *RECIPE, "log.tensorboard=true", processes=2)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_directory_and_terminal(undisturbed):
    folder, printed = undisturbed
    names = [
        "config.yaml",
        "starts.jsonl",
        "metrics.jsonl",
        "summary.png",
        "logs/rank-0.log",
        "logs/rank-1.log",
    ]
    for name in [*names, "checkpoints/last/manifest.json", "checkpoints/best"]:
        assert (folder / name).exists(), name
    start = json.loads((folder / "starts.jsonl").read_text())
    assert start["versions"]["torch"] == torch.__version__
    assert len(start["hosts"]) == 2
    assert "train" in start["command"]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    for part in ("activated", "GMACs", "1 data × 2 expert", "stage 2", "fp32", "moe_dispatch",
                 "epoch 0.6/1", "top-1", "summary.png", "swin-moe evaluate",
                 "logs/rank-0.log to rank-1.log", "100 images an update"):  # fmt: skip
        assert part in printed
    # Without a terminal it prints a line per log.every_steps, without control sequences.
    lines = re.findall(r"^epoch 1/1  step (\d+)  loss .* lr .* img/s  eta \d+:", printed, re.M)
    assert [int(step) for step in lines] == list(range(1, 61))
    assert "\x1b" not in printed
    records = read_metrics(folder)
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, 61))
    assert {"train/loss", "train/lr", "train/grad_norm", "train/aux_loss"} <= set(records[0])
    load = records[0]["moe/layers.1.blocks.1/load"]
    assert len(load) == 4
    assert sum(load) == pytest.approx(1, abs=1e-3)
    figures = (
        "drop_rate",
        "max_violation",
        "gate_entropy",
        "dead_experts",
        "logit_min",
        "logit_max",
    )
    assert {f"moe/layers.1.blocks.1/{figure}" for figure in figures} <= set(records[0])
    assert 0 <= records[-1]["val/top1"] <= 100


def test_one_seed_is_one_run_bit_for_bit(undisturbed, tmp_path):
    folder = tmp_path / "again"
    done = train(folder, *RECIPE, "log.tensorboard=false", processes=2)
    assert done.returncode == 0, done.stderr
    assert figures(folder) == figures(undisturbed[0])
    mine, theirs = (
        read_manifest(run / "checkpoints/last").files for run in (folder, undisturbed[0])
    )
    for name, entry in theirs.items():
        assert name == "config.yaml" or mine[name] == entry
    done = train(tmp_path / "other", *RECIPE, "train.seed=1", "train.max_steps=1", processes=2)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "other")[0] != figures(folder)[0]


def test_evaluate_repeats_the_final_accuracy_on_one_process(undisturbed):
    folder, _ = undisturbed
    done = swin_moe("evaluate", str(folder))
    assert done.returncode == 0, done.stderr
    found = float(re.search(r"top-1 ([\d.]+) %", done.stdout)[1])
    assert found == pytest.approx(read_metrics(folder)[-1]["val/top1"], abs=0.051)
    assert "Ankle boot" in done.stdout


def test_kill_and_resume_repeat_the_losses_exactly(undisturbed, tmp_path):
    """After SIGKILL, and with the newest checkpoint truncated, the one before it is resumed."""
    folder = tmp_path / "killed"
    process = start("swin_moe", *training(folder, *RECIPE, processes=2), processes=2)
    deadline = time.monotonic() + PATIENCE
    while len(list_checkpoints(folder / "checkpoints")) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    process.kill_all()
    newest = list_checkpoints(folder / "checkpoints")[0]
    with (newest / "rank-00000.safetensors").open("r+b") as file:
        file.truncate(1000)

    done = train(folder, *RECIPE, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"{newest}: rank-00000.safetensors has 1000 of" in done.stderr
    assert "resumed from step-00000020 (epoch 1, step 20)" in done.stdout
    assert figures(folder) == figures(undisturbed[0])


def test_a_model_built_in_parts_resumes_exactly(tmp_path):
    """ZeRO-3 reads each module's weights from the checkpoint as it builds the module."""
    options = [*RECIPE, "zero.stage=3", "parallel.expert_parallel_size=1", "train.max_steps=4",
               "checkpoint.every_steps=2"]  # fmt: skip
    folder, again = tmp_path / "run", tmp_path / "again"
    done = train(folder, *options, processes=2)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder, again, symlinks=True)
    shutil.rmtree(list_checkpoints(again / "checkpoints")[0])
    done = train(again, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert "resumed from step-00000002" in done.stdout
    assert figures(again) == figures(folder)
    mine, theirs = (read_manifest(run / "checkpoints/last").files for run in (again, folder))
    for name, entry in theirs.items():
        assert name == "config.yaml" or mine[name] == entry


def test_finished_run_resumes_to_nothing_and_fresh_keeps_it(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed[0], folder, symlinks=True)
    before = figures(folder)
    done = train(folder, *RECIPE, processes=2)
    assert done.returncode == 0, done.stderr
    assert figures(folder) == before
    done = train(folder, "--fresh", *RECIPE, "train.max_steps=1", processes=2)
    assert done.returncode == 0, done.stderr
    moved = [path for path in tmp_path.iterdir() if path != folder]
    assert len(moved) == 1
    assert str(moved[0]) in re.sub(r"\s", "", done.stdout)
    assert figures(moved[0]) == before
    assert figures(folder)[0] == before[0]


def test_another_global_batch_goes_on_where_it_was(undisturbed, tmp_path):
    """Two processes with expert parallelism, then one: the step counter never falls."""
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed[0], folder, symlinks=True)
    before = figures(folder)
    done = train(folder, "precision.dtype=fp32", "data.batch_size=200", "zero.stage=1",
                 "train.max_steps=63", "log.every_steps=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the global batch was 100 and is 200" in done.stderr
    records = figures(folder)
    assert records[: len(before)] == before
    assert [r["step"] for r in records if "train/loss" in r][-3:] == [61, 62, 63]
    assert records[-1]["epoch"] == pytest.approx(0.6 + 3 / 50)
    assert (folder / "checkpoints/last").resolve().name == "step-00000063"


def test_two_trainings_do_not_share_a_directory(undisturbed):
    with (undisturbed[0] / ".swin_moe").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = train(undisturbed[0], *RECIPE, processes=2)
    assert done.returncode == 2
    assert "another training runs in" in one_error(done)


def test_another_model_does_not_resume(undisturbed):
    folder, _ = undisturbed
    before = (folder / "config.yaml").read_text()
    done = train(folder, *RECIPE, "model.embed_dim=32", processes=2)
    assert done.returncode == 2
    assert one_error(done).startswith("model.embed_dim=32, but the checkpoint")
    assert (folder / "config.yaml").read_text() == before


def test_a_run_that_is_done_names_the_key_that_ends_it():
    plan = TrainingPlan(3, 10, 1, 1, 1, 0, 1, 25, 0.0)
    assert plan.limit(Position(step=24, epoch=2, update=4)) == ""
    assert plan.limit(Position(step=25, epoch=2, update=5)) == "train.max_steps"
    assert plan.limit(Position(step=30, epoch=3)) == "schedule.epochs"
    limit = plan.limit(Position(step=25, epoch=2, update=5))
    result = Result(Metric("top1", "top-1", "%"), None, None, -1, 0, 0.0, limit)
    console = Console(width=200, file=StringIO())
    console.print(closing(Path("run"), result, 1.0))
    expected = "nothing was left to do: raise train.max_steps to go on; --fresh"
    assert expected in console.file.getvalue()
