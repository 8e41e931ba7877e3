"""A run keeps the names of its classes: its labels never shift."""

import json
import shutil

import pytest

from swin_moe.cli.main import main
from tests.data.helpers import make_folder
from tests.parallel import one_error, train

CLASSES = ["ant", "bee", "cow"]
DATA = ["model.img_size=16", "model.num_classes=3", "data.mean=[0.5]", "data.std=[0.5]",
        "model.in_chans=1", "data.batch_size=3", "checkpoint.every_steps=1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make data and a run of two updates."""
    folder = tmp_path_factory.mktemp("classes")
    for split in ("train", "val"):
        make_folder(folder / "data" / split, CLASSES)
    done = train(folder / "run", *DATA, f"data.path={folder / 'data'}", "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    return folder


def test_checkpoints_hold_the_names(trained):
    path = trained / "run/checkpoints/last/classes.json"
    assert json.loads(path.read_text()) == CLASSES


def test_a_resume_reports_changes_and_keeps_the_old_config(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    here = tmp_path / "data"
    shutil.copytree(trained / "data", here)
    done = train(tmp_path / "run", *DATA, f"data.path={here}", "optimizer.base_lr=1e-4")
    assert done.returncode == 0, done.stderr
    assert f"changed since step 1: data.path {trained / 'data'}"[:60] in done.stdout
    assert "optimizer.base_lr" in done.stdout
    assert (tmp_path / "run/config-until-step-00000001.yaml").is_file()


def test_another_class_is_refused_and_a_missing_one_needs_a_word(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    make_folder(tmp_path / "data/train", ["ant", "asp", "bee"], per_class=3)
    make_folder(tmp_path / "data/val", CLASSES)
    words = [*DATA, f"data.path={tmp_path / 'data'}"]
    assert "lacks 1 of its classes: 'asp'" in one_error(train(tmp_path / "run", *words))
    shutil.rmtree(tmp_path / "data/train/asp")
    error = one_error(train(tmp_path / "run", *words))
    assert "of 2 classes (none of 'cow')" in error
    assert "--accept-changes" in error
    done = train(tmp_path / "run", *words, "--accept-changes")
    assert done.returncode == 0, done.stderr


def test_evaluate_matches_by_name(trained, tmp_path, capsys, caplog):
    make_folder(tmp_path / "val", ["bee", "cow"])
    assert main(["evaluate", str(trained / "run"), f"data.path={tmp_path}"]) == 0
    table = capsys.readouterr().out
    assert "bee" in table
    assert "ant" not in table.replace(str(tmp_path), "")
    assert "no sample of 1 of the 3 classes of the model ('ant')" in caplog.text
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "bees")
    assert main(["evaluate", str(trained / "run"), f"data.path={tmp_path}"]) == 2
    assert "lacks 1 of its classes: 'bees'" in capsys.readouterr().err
