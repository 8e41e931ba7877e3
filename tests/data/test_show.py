"""The contact sheet, its labels, and the warning of a slow loader."""

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from swin_moe.config import load_config
from swin_moe.data.watch import IN_A_ROW, LoaderWatch
from swin_moe.reporting.contact_sheet import show
from swin_moe.tasks.classification import soft_label

from .helpers import encode, make_folder

CONFIG = """\
model: {name: swinv2, img_size: 32, window_size: 4, num_classes: 2}
data: {path: %s, batch_size: 10, num_workers: 0}
"""


def test_show_draws_training_and_held_out_images(tmp_path, capsys):
    make_folder(tmp_path / "train", ["ant", "bee"], per_class=20)
    make_folder(tmp_path / "val", ["ant", "bee"])
    (tmp_path / "train" / "ant" / "3.png").write_bytes(encode(3)[:50])  # another stands in for it
    config = tmp_path / "x.yaml"
    config.write_text(CONFIG % tmp_path)
    output = tmp_path / "data.png"
    before = torch.random.get_rng_state()
    show(load_config(config, ["model.depths=[1,1,1,1]"]), output, Console(width=200))
    assert torch.equal(before, torch.random.get_rng_state())
    out = capsys.readouterr().out
    assert "train: 40 samples, 2 classes, image folder" in out
    assert "data.png" in out
    pixels = np.asarray(Image.open(output).convert("RGB"))
    assert pixels.shape[:2] == (5 * 182 + 34, 8 * 150 + 8)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_a_picture_takes_no_other_files_place(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text(CONFIG % tmp_path)
    with pytest.raises(ValueError, match=r"x\.yaml: give the name of a \.png file"):
        show(load_config(config), config, Console())
    assert config.read_text() == CONFIG % tmp_path


def test_labels_of_mixed_images():
    names = ["ant", "bee", "a name that is much too long"]
    assert soft_label(torch.tensor([0.02, 0.96, 0.02]), names) == "bee"
    assert soft_label(torch.tensor([0.30, 0.68, 0.02]), names) == "0.68 bee\n0.30 ant"
    assert soft_label(torch.tensor([0.1, 0.1, 0.8]), names) == "a name that is mu…"
    assert soft_label(torch.tensor([0.0, 1.0, 0.0]), None) == "1"
    assert soft_label(torch.tensor([1.0]), ["only"]) == "only"


def test_a_slow_loader_is_named_once(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    watch = LoaderWatch()
    lines = [watch.check(share, workers=2) for share in [0.9, 0.9, 0.1] + [0.5] * (IN_A_ROW + 3)]
    assert [bool(line) for line in lines] == [False] * 5 + [True] + [False] * 3
    assert "50% of the time" in lines[5]
    assert "raise data.num_workers from 2, this process may use 8 cores" in lines[5]
    full = LoaderWatch()
    *_, line = (full.check(0.5, workers=8) for _ in range(IN_A_ROW))
    assert "swin-moe prepare-data --resize" in line
