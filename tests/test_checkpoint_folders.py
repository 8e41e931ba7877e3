"""Folders of checkpoints among what people and programs leave beside them."""

import shutil

import pytest
import torch

from swin_moe import checkpoint
from swin_moe.checkpoint import CheckpointError
from swin_moe.checkpoint import folder as folder_module
from tests.saving import save


def write(folder, step, **options):
    return save(folder, step, [("a", {"weight": torch.zeros(2)})], **options)


def test_a_folder_under_another_name_is_passed_over(tmp_path, caplog):
    first = write(tmp_path, 1)
    shutil.copytree(first, tmp_path / "step-00000007")
    assert checkpoint.latest(tmp_path) == first
    assert "its state.json is of step 1, not the folder's" in caplog.text


def test_names_of_classes_come_from_the_newest_that_has_any(tmp_path):
    write(tmp_path, 1, class_names=["cat", "dog [red]"])
    path = write(tmp_path, 2, class_names=["x"])
    (path / "classes.json").write_text("{}")
    write(tmp_path, 3)
    assert checkpoint.known_classes(tmp_path) == ["cat", "dog [red]"]
    with pytest.raises(CheckpointError, match=r"classes.json is not a list of names"):
        checkpoint.class_names(path)


def test_a_manifest_of_endless_depth_is_damaged(tmp_path):
    write(tmp_path, 1)
    second = write(tmp_path, 2)
    (second / "manifest.json").write_text("[" * 200_000)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"


def test_a_reader_follows_a_run_that_prunes(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    write(folder, 1)
    verify = folder_module.verify

    def pruned_meanwhile(path):
        monkeypatch.setattr(folder_module, "verify", verify)
        write(folder, 2, keep_last=1)
        verify(path)

    monkeypatch.setattr(folder_module, "verify", pruned_meanwhile)
    assert checkpoint.choose(tmp_path) == folder / "step-00000002"


def test_what_lies_beside_checkpoints_is_no_obstacle(tmp_path, caplog):
    (tmp_path / "last").mkdir(parents=True)
    (tmp_path / "last" / "mine").touch()
    (tmp_path / ".best").mkdir()
    (tmp_path / "partial-file").touch()
    (tmp_path / "partial-link").symlink_to(tmp_path / "last")
    checkpoint.clear_partial(tmp_path)
    write(tmp_path, 1, best_step=1)
    assert {path.name for path in tmp_path.iterdir()} == {"last", "best", "step-00000001"}
    assert (tmp_path / "last" / "mine").exists()
    assert "last is a folder where a link belongs" in caplog.text
