"""Messages about errors of the system name the file, the key and the remedy."""

import argparse
import errno
import os

import pytest

from swin_moe.cli.main import main
from swin_moe.cli.system_errors import explain
from tests.parallel import MICRO


@pytest.mark.parametrize(
    ("number", "filename", "line"),
    [
        (errno.EACCES, "/runs/a/logs", "/runs/a/logs: Permission denied (train.output=/runs/a): "
         "give yourself the right to use it, or set another train.output"),
        (errno.ENOENT, "/runs", "/runs: No such file or directory (train.output=/runs/a): check "
         "the path, or set another train.output"),
        (errno.EIO, b"/data/set/x.tar", "/data/set/x.tar: Input/output error (data.path=/data/set):"
         " the disk or its server fails; the system's log (dmesg) says more, or set another "
         "data.path"),
        (errno.EISDIR, "/else where\n", "/else where\\n: Is a directory: a file is needed, and this"
         " is a folder: check the path"),
        (errno.ENOSPC, None, "No space left on device (train.output=/runs/a): make room there, or "
         "set another train.output"),
        (errno.EMFILE, None, "Too many open files: allow more open files (ulimit -n), or lower "
         "data.num_workers"),
        (errno.EXDEV, "/a", "/a: Invalid cross-device link"),
    ],
)  # fmt: skip
def test_a_system_error_names_file_key_and_mend(number, filename, line):
    overrides = ["train.output=/runs/a", "data.path=/data/set"]
    arguments = argparse.Namespace(config=str(MICRO), overrides=overrides)
    assert explain(OSError(number, os.strerror(number), filename), arguments) == line


def test_without_a_config_or_a_number_there_is_less_to_say():
    nothing = argparse.Namespace(path="x")
    assert explain(ConnectionError("rank 0 is gone"), nothing) == "rank 0 is gone"
    assert explain(FileNotFoundError(2, "No such file or directory", "x"), nothing) == (
        "x: No such file or directory: check the path"
    )
    broken = argparse.Namespace(config="no such.yaml", overrides=[])
    assert explain(OSError(28, "No space left on device"), broken) == (
        "No space left on device: make room there"
    )


def test_a_removed_working_folder_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["train", "x.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "swin-moe: error: the folder in which this was started has been removed: cd to another one"
    ]
