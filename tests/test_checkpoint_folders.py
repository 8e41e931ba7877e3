"""Folders of checkpoints among files that people and programs leave there."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from swin_moe import checkpoint
from swin_moe.checkpoint import CheckpointError
from swin_moe.checkpoint import folder as folder_module
from swin_moe.checkpoint import writer as writer_module
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


def test_other_files_next_to_checkpoints_are_no_obstacle(tmp_path, caplog):
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


def refuse(monkeypatch, owner, name, number, only=""):
    """Make ``owner.name`` raise a system error for paths that contain ``only``."""
    usual = getattr(owner, name)

    def refused(path, *others, **options):
        place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if only in place and (name != "fsync" or os.path.isdir(place)):
            raise OSError(number, os.strerror(number), place)
        return usual(path, *others, **options)

    monkeypatch.setattr(owner, name, refused)


def test_a_file_system_without_links_rights_and_flushed_folders_holds_checkpoints(
    tmp_path, monkeypatch, caplog
):
    refuse(monkeypatch, Path, "symlink_to", errno.EPERM)
    refuse(monkeypatch, Path, "chmod", errno.EPERM)
    refuse(monkeypatch, os, "fsync", errno.EINVAL)
    for step in (1, 2):
        checkpoint.verify(write(tmp_path, step, best_step=1))
    warnings = [f"{tmp_path / n} cannot be made a link to a checkpoint" for n in ("last", "best")]
    assert [caplog.text.count(text) for text in warnings] == [1, 1]


def test_failing_removals_make_no_save_fail(tmp_path, monkeypatch, caplog):
    first = write(tmp_path, 1)
    (tmp_path / "partial-x").mkdir()
    refuse(monkeypatch, folder_module, "remove", errno.EACCES, only="partial-")
    checkpoint.clear_partial(tmp_path)
    checkpoint.verify(write(tmp_path, 2, keep_last=1))
    assert f"{first} cannot be removed (Permission denied)" in caplog.text
    assert f"{tmp_path / 'partial-x'} cannot be removed (Permission denied)" in caplog.text


def test_the_former_best_stays_where_the_best_could_not_be_written(tmp_path):
    first = write(tmp_path, 1, keep_last=1, best_step=1)
    for step in (3, 4):  # the save of step 2 has failed
        write(tmp_path, step, keep_last=1, best_step=2)
    assert checkpoint.list_checkpoints(tmp_path) == [tmp_path / "step-00000004", first]
    assert (tmp_path / "best").resolve() == first


def test_an_error_of_a_write_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(
            errno.ENOSPC, "No space left on device"
        )  # without a name, like that of a write

    monkeypatch.setattr(writer_module, "write_file", full)
    file = r"\S+partial-step-00000001-\S+/rank-00000.safetensors"
    with pytest.raises(OSError, match=rf"No space left on device \({file}\)"):
        write(tmp_path, 1)
