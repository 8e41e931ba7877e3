"""``swin-moe checkpoint``: list, verify, reshard, and export the weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from swin_moe.checkpoint import Reader, contents
from swin_moe.cli.main import main
from swin_moe.config import dump_config, load_config
from swin_moe.models import build
from tests.parallel import MICRO, SMALL
from tests.saving import save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    config = load_config(MICRO, SMALL)
    torch.manual_seed(0)
    model = build(config.model, config.moe)
    for step in (1, 2):
        save_model(folder / "checkpoints", step, model, dump_config(config))
    return folder


def test_list_shows_all_checkpoints(run, capsys):
    assert main(["checkpoint", "list", str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("step-00000002") < printed.index("step-00000001")
    assert "last" in printed


@pytest.mark.parametrize("files", [1, 3])
def test_reshard_changes_files_and_nothing_else(run, tmp_path, capsys, files):
    assert main(["checkpoint", "reshard", str(run), str(tmp_path / "out"), f"--files={files}"]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == 0
    assert "whole" in capsys.readouterr().out
    old, new = Reader(run / "checkpoints/last"), Reader(tmp_path / "out")
    assert len([name for name in new.files if name.startswith("rank-")]) == files
    assert old.names() == new.names()
    for name, entry in old.entries.items():
        for kind in entry.kinds:
            assert torch.equal(old.tensor(name, kind), new.tensor(name, kind))
    assert main(["checkpoint", "reshard", str(run), str(tmp_path / "out")]) == 2  # it exists
    assert main(["checkpoint", "reshard", str(run), str(tmp_path / "no"), "--files=0"]) == 2


def test_export_is_one_file_of_weights(run, tmp_path):
    target = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "export", str(run), str(target)]) == 0
    weights = load_file(target)
    reader = Reader(run / "checkpoints/last")
    assert set(weights) == set(reader.names())
    for name, tensor in weights.items():
        assert torch.equal(tensor, reader.tensor(name))
    assert main(["checkpoint", "export", str(run), str(tmp_path / "weights.pth")]) == 2


def test_verify_finds_a_flipped_bit_and_returns_an_exit_code(run, tmp_path, capsys):
    assert main(["checkpoint", "reshard", str(run), str(tmp_path / "out")]) == 0
    file = tmp_path / "out/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == 1
    assert "has changed (SHA-256)" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2


def test_a_checkpoint_that_a_running_training_removes_is_no_damage(
    run, tmp_path, capsys, monkeypatch
):
    live = tmp_path / "run"
    shutil.copytree(run, live, symlinks=True)
    removed = live / "checkpoints/step-00000002"
    names = contents.class_names

    def prune(path):  # while the first is read
        if path == removed:
            shutil.rmtree(removed, ignore_errors=True)
        return names(path)

    monkeypatch.setattr(contents, "class_names", prune)
    assert main(["checkpoint", "verify", str(live)]) == 0
    printed = capsys.readouterr().out
    assert "step-00000002: removed meanwhile by a running training" in printed
    assert "step-00000001: whole" in printed
    shutil.copytree(run / "checkpoints/step-00000002", removed)
    assert main(["checkpoint", "list", str(live)]) == 0
    assert "removed meanwhile" in capsys.readouterr().out
    shutil.copytree(run / "checkpoints/step-00000002", removed)
    target = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "export", str(live), str(target)]) == 0
    assert target.exists()
    shutil.copytree(run / "checkpoints/step-00000002", removed)
    assert main(["checkpoint", "export", str(removed), str(target), "--overwrite"]) == 2
    assert "step-00000002 is gone" in capsys.readouterr().err
