"""The run directory: its owner, its lock, and the checkpoint to resume."""

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from swin_moe.common import ranks
from swin_moe.config import load_config
from swin_moe.distributed.watchdog import Watchdog
from swin_moe.reporting.metric_log import MetricLog, read_metrics
from swin_moe.training import run_directory
from swin_moe.training.run_directory import MARKER, Run, adopt_folder, write_config
from tests.parallel import MICRO
from tests.saving import ALONE, save


@pytest.fixture(autouse=True)
def _release(monkeypatch):
    held = []
    monkeypatch.setattr(run_directory, "held_locks", held)
    yield
    for handle in held:
        handle.close()


def run_of(folder):
    return Run(folder, ALONE, Console(quiet=True))


def test_a_run_that_hardly_began_begins(tmp_path):
    (tmp_path / MARKER).touch()
    (tmp_path / "logs").mkdir()
    assert adopt_folder(run_of(tmp_path), fresh=False) == ""
    assert (tmp_path / "logs").is_dir()


def test_a_run_that_is_held_is_waited_for_and_its_holder_named(tmp_path, monkeypatch, caplog):
    assert adopt_folder(run_of(tmp_path / "run"), fresh=False) == ""
    holder = rf"another training runs in .*run \(process {os.getpid()} on .+\): wait for it, end it"
    waited = []
    monkeypatch.setattr(run_directory.time, "sleep", waited.append)
    monkeypatch.setattr(run_directory.time, "monotonic", lambda: sum(waited))
    with pytest.raises(ValueError, match=holder):
        adopt_folder(run_of(tmp_path / "run"), fresh=False)
    assert 10 <= sum(waited) < 11
    assert caplog.text.count("waiting for the training that runs in") == 1
    (tmp_path / "run" / MARKER).write_bytes(b"\xff")  # not written by swin-moe
    with pytest.raises(ValueError, match=r"another training runs in \S*run: wait"):
        adopt_folder(run_of(tmp_path / "run"), fresh=False)


def test_a_start_waits_some_seconds_for_the_last_one_to_end(tmp_path, monkeypatch):
    assert adopt_folder(run_of(tmp_path / "run"), fresh=False) == ""
    monkeypatch.setattr(
        run_directory.time, "sleep", lambda _: run_directory.held_locks.pop().close()
    )
    assert adopt_folder(run_of(tmp_path / "run"), fresh=False) == ""


def test_a_copy_without_the_hidden_marker_is_a_run(tmp_path):
    path = save(tmp_path / "run/checkpoints", 1, [("a", {"weight": torch.zeros(2)})])
    assert adopt_folder(run_of(tmp_path / "run"), fresh=False) == str(path)
    assert (tmp_path / "run" / MARKER).exists()
    (tmp_path / "other/checkpoints/step-00000001").mkdir(parents=True)  # another program's
    with pytest.raises(ValueError, match="was not made by swin-moe"):
        adopt_folder(run_of(tmp_path / "other"), fresh=False)


def test_a_run_begins_beside_what_was_printed_to_a_file_and_beside_nothing_else(tmp_path):
    folder = tmp_path / "run"
    (folder / "lost+found").mkdir(parents=True)
    (folder / "slurm-12.out").write_text("printed")
    (folder / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"was not made by swin-moe \(it holds notes\)"):
        adopt_folder(run_of(folder), fresh=False)
    (folder / "notes").unlink()
    assert adopt_folder(run_of(folder), fresh=False) == ""
    assert (folder / "slurm-12.out").read_text() == "printed"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "flock", refuse)
    assert adopt_folder(run_of(tmp_path / "run"), fresh=False) == ""
    assert "has no locks (Function not implemented); let no second training run" in caplog.text


@pytest.mark.parametrize("kind", ["a file", "a broken link", "a folder", "a pipe"])
def test_odd_things_in_a_run_stop_no_start(tmp_path, kind, monkeypatch, caplog):
    """Each is a warning at most."""
    make = {
        "a file": Path.touch,
        "a broken link": lambda path: path.symlink_to("/nowhere/else"),
        "a folder": lambda path: (path / "mine").mkdir(parents=True),
        "a pipe": os.mkfifo,
    }[kind]
    log_file = tmp_path / "logs/rank-0.log"
    inner = kind in ("a folder", "a pipe")
    if inner:
        log_file.parent.mkdir()
    files = ("starts.jsonl", "config.yaml", "metrics.jsonl", "metrics.tmp", "tensorboard")
    for path in (*(tmp_path / name for name in files), log_file if inner else log_file.parent):
        make(path)
    run = run_of(tmp_path)
    root = logging.getLogger()
    former = list(root.handlers)
    run_directory.log_to_file(run.log_file)
    dog = Watchdog(0, 0)
    dog.log_to(run.log_file)
    monkeypatch.setattr(run_directory, "gather_objects", lambda one: [one])
    run_directory.record_start(run, "")
    write_config(tmp_path, load_config(MICRO, []), None)
    metrics = MetricLog(tmp_path, tensorboard=True, resume_step=3)
    metrics.write({"step": 4, "epoch": 1.0})
    metrics.close()
    dog.stop()
    for handler in [one for one in root.handlers if one not in former]:
        root.removeHandler(handler)
        handler.close()
    if kind != "a folder":
        assert load_config(tmp_path / "config.yaml") == load_config(MICRO, [])
    if kind in ("a file", "a pipe"):
        assert [record["step"] for record in read_metrics(tmp_path)] == [4]
    if kind == "a file":
        assert "logs/rank-0.log cannot be written (Not a directory)" in caplog.text


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_without_a_checkpoint_is_moved_aside(tmp_path, fresh):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (MARKER, "metrics.jsonl"):
        (folder / name).touch()
    assert adopt_folder(run_of(folder), fresh) == ""
    assert [path.name for path in folder.iterdir()] == [MARKER]
    assert len(list(tmp_path.glob("run.*/metrics.jsonl"))) == 1


def test_a_restart_waits_for_processes_of_the_last_start(tmp_path, monkeypatch):
    assert adopt_folder(run_of(tmp_path / "run"), fresh=False) == ""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(
        run_directory.time, "sleep", lambda _: run_directory.held_locks.pop().close()
    )
    assert adopt_folder(run_of(tmp_path / "run"), fresh=False) == ""


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_restarts_are_known(monkeypatch, name):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert not ranks.started_again()
    monkeypatch.setenv(name, "0")
    assert not ranks.started_again()
    monkeypatch.setenv(name, "2")
    assert ranks.started_again()


def test_the_config_before_a_change_is_kept_through_further_starts(tmp_path):
    reader = SimpleNamespace(path=tmp_path / "step-00000135")
    old, new = (load_config(MICRO, [f"optimizer.base_lr={rate}"]) for rate in ("1e-3", "2e-3"))
    write_config(tmp_path, old, None)
    for _ in range(2):  # the second start comes before the next checkpoint
        write_config(tmp_path, new, reader)
    kept = load_config(tmp_path / "config-until-step-00000135.yaml")
    assert kept.optimizer.base_lr == 1e-3
    assert load_config(tmp_path / "config.yaml").optimizer.base_lr == 2e-3
