"""Bad input, every ZeRO stage on one process, and every way to start, in fresh processes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from PIL import Image

from swin_moe.checkpoint import list_checkpoints
from swin_moe.cli.parser import parse
from swin_moe.config import ConfigError, load_config
from swin_moe.reporting.metric_log import read_metrics
from tests.parallel import MICRO, SMALL, one_error, start, swin_moe, train


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.windw_size=4"], "did you mean 'model.window_size'?"),
        (["data.path=nowhere"], "data.path"),
        (["parallel.expert_parallel_size=4"], "does not divide the 2 processes"),
        (["moe.num_experts=5"], "moe.num_experts=5 is not divisible"),
        (["train.gradient_accumulation_steps=1000"], "train.gradient_accumulation_steps=1000"),
        (["data.global_batch=1000000"], "data.global_batch=1000000 is more than the images of an"),
    ],
)  # fmt: skip
def test_bad_input_ends_every_rank_with_one_line(tmp_path, overrides, expected):
    folder = tmp_path / "run"
    done = train(folder, *overrides, processes=2)
    assert done.returncode == 2
    assert expected in one_error(done)
    assert not folder.exists()


def test_nonfinite_loss_stops_before_the_step(tmp_path):
    folder = tmp_path / "run"
    done = train(folder, "precision.dtype=fp32", "zero.stage=1", "optimizer.base_lr=1e38",
                 "schedule.warmup_epochs=0", "checkpoint.every_steps=1", "faults.nonfinite=stop",
                 processes=2)  # fmt: skip
    assert done.returncode == 1
    message = one_error(done)
    step = int(
        re.match(r"non-finite (?:loss|tokens at \S+) on rank [01] at step (\d+);", message)[1]
    )
    kept = list_checkpoints(folder / "checkpoints")
    assert [int(path.name[5:]) for path in kept] == list(range(step - 1, max(step - 3, 0), -1))
    assert "last checkpoint is kept" in message
    assert "precision.dtype=fp32" not in message  # it is fp32 already


def test_where_there_is_no_checkpoint_yet_none_is_said_to_be_kept(tmp_path):
    done = train(tmp_path / "run", "precision.dtype=fp32", "optimizer.base_lr=1e38",
                 "schedule.warmup_epochs=0", "faults.nonfinite=stop")  # fmt: skip
    assert done.returncode == 1
    assert "the weights were not changed and there is no checkpoint yet (try" in one_error(done)


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    for options in ([], ["--fresh"]):
        done = train(tmp_path, "train.max_steps=1", *options)
        assert done.returncode == 2
        assert "not empty and was not made by swin-moe" in one_error(done)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_process_trains_at_each_stage(tmp_path, stage):
    done = train(
        tmp_path / "run", f"zero.stage={stage}", "train.max_steps=25", "precision.dtype=auto"
    )
    assert done.returncode == 0, done.stderr
    losses = [r["train/loss"] for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    assert losses[-1] < losses[0]


def test_module_and_plain_torchrun_are_the_same_program(tmp_path):
    done = start(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "swin_moe",
        "train", str(MICRO), *SMALL, "train.max_steps=1", f"train.output={tmp_path / 'run'}",
        fresh=True,
    ).finish()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())["step"] == 1
    assert Path(tmp_path / "run/logs/rank-1.log").exists()


def write_images(folder, **counts):
    """Write folders of two classes; ``counts`` are the images per class by split."""
    for split, count in counts.items():
        for label in range(2):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = numpy.random.default_rng(index + 100 * label).integers(0, 255, (20, 20))
                image = Image.fromarray(pixels.astype("uint8"))
                image.save(folder / split / f"class{label}" / f"{index}.png")


def test_corrupt_images_are_skipped_counted_and_reported(tmp_path):
    """Write folders of real images, some of them damaged."""
    write_images(tmp_path / "data", train=12, val=4)
    (tmp_path / "data/train/class0/3.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "data/val/class1/0.png").write_bytes(b"")
    done = train(
        tmp_path / "run", f"data.path={tmp_path / 'data'}", "data.batch_size=4",
        "model.num_classes=2", "data.eval_batch_size=3", processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = read_metrics(tmp_path / "run")[-1]
    assert last["data/unreadable"] == 2
    assert "class0/3.png" in done.stderr
    assert "class1/0.png" in done.stderr
    assert "img/s  (1 images unreadable)" in done.stdout  # of the held-out ones
    assert re.search(r"unreadable\W+2 images were skipped", done.stdout)
    lists = sorted((tmp_path / "run/logs").glob("bad-samples-rank-*.jsonl"))
    listed = [json.loads(line) for path in lists for line in path.read_text().splitlines()]
    assert {Path(sample["key"]).name for sample in listed} == {"3.png", "0.png"}
    assert {sample["kind"] for sample in listed} <= {"not an image", "truncated", "damaged"}
    done = swin_moe("evaluate", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "(7 images, 1 unreadable)" in done.stdout


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    write_images(tmp_path / "data", train=60, val=4)
    for index in range(12):
        (tmp_path / f"data/train/class{index % 2}/{index}.png").write_bytes(b"no image")
    recipe = [f"data.path={tmp_path / 'data'}", "data.batch_size=10", "model.num_classes=2"]
    done = train(tmp_path / "run", *recipe)
    assert done.returncode == 1
    assert re.match(
        r"1[12] of 120 training images could not be read in this epoch, more than "
        r"data\.max_bad_share=0\.001: logs/bad-samples-rank-\*\.jsonl",
        done.stderr.splitlines()[-1].removeprefix("swin-moe: error: "),
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.count("skipped unreadable image") == 10  # the list has the others
    assert len((tmp_path / "run/logs/bad-samples-rank-0.jsonl").read_text().splitlines()) > 10
    done = train(tmp_path / "other", *recipe, "data.max_bad_share=0.2")
    assert done.returncode == 0, done.stderr


def test_a_resume_keeps_its_windows(tmp_path):
    """Another window is another function and needs a new run."""
    from swin_moe.training.run_directory import check_same_model

    reader = SimpleNamespace(path=tmp_path)
    saved = load_config(MICRO)
    check_same_model(reader, saved, load_config(MICRO, ["schedule.epochs=3"]))
    for overrides, message in (
        (["model.window_size=8", "model.img_size=64"], r"windows \[8, 8, 4\].*\[4, 4, 2\]"),
        (["model.pretrained_window_sizes=[8,8,8]"], "model.pretrained_window_sizes"),
        (["model.embed_dim=32"], "model.embed_dim=32"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_same_model(reader, saved, load_config(MICRO, overrides))


def test_a_missing_argument_is_named_alone(capsys):
    with pytest.raises(SystemExit):
        parse(["train"])
    assert "are required: CONFIG (see swin-moe train --help)" in capsys.readouterr().err
