"""Logs, figures and prints that cannot be written: reported once and written later."""

import errno
import os
import subprocess
import sys

import pytest

from swin_moe.common import writing
from swin_moe.common.writing import Appender, unbreakable_streams


@pytest.fixture
def disk(monkeypatch):
    """Limit the file system to a number of bytes, [0], which may be changed."""
    room = [0]

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self.file.write(bytes(data[: room[0]]))
            room[0] -= written
            return written

    opened = writing.open_to_append
    monkeypatch.setattr(writing, "open_to_append", lambda path: Full(opened(path)))
    return room


def test_data_that_a_full_disk_refuses_is_written_later(tmp_path, disk, caplog):
    file = Appender(tmp_path / "metrics.jsonl")
    disk[0] = 10
    for line in (b"first\n", b"second\n", b"third\n"):
        file.write(line)
    assert file.path.read_bytes() == b"first\nseco"
    disk[0] = 1000
    file.write(b"fourth\n")
    file.write(b"fifth\n")
    file.close()
    assert file.path.read_bytes() == b"first\nsecond\nthird\nfourth\nfifth\n"
    first, last = caplog.messages
    assert first == (
        f"{file.path} cannot be written (No space left on device); training goes on, and up to "
        "16 MB of it are kept in memory"
    )
    assert last == f"{file.path} is written again, and nothing of it is lost"


def test_memory_has_a_bound_and_lost_bytes_are_reported(tmp_path, disk, monkeypatch, caplog):
    monkeypatch.setattr(writing, "KEPT", 12)
    file = Appender(tmp_path / "rank-0.log")
    for line in (b"first\n", b"second record\n", b"third\n"):
        file.write(line)
    disk[0] = 1000
    file.write(b"fourth\n")
    assert file.path.read_bytes() == b"first\nthird\nfourth\n"
    assert "without 14 bytes for which there was no room in memory" in caplog.text
    disk[0] = 3
    file.write(b"fifth\n")
    file.close()
    assert caplog.messages[-1] == f"{file.path} lacks its last 3 bytes"


def test_a_folder_that_is_removed_and_comes_back(tmp_path, caplog):
    (tmp_path / "logs").mkdir()
    file = Appender(tmp_path / "logs/rank-0.log")
    file.write(b"first\n")
    (tmp_path / "logs").rename(tmp_path / "moved")
    file.write(b"second\n")
    (tmp_path / "moved").rename(tmp_path / "logs")
    file.write(b"third\n")
    assert file.path.read_bytes() == b"first\nsecond\nthird\n"
    assert len(caplog.messages) == 2


def test_a_pipe_without_a_reader_is_not_waited_for(tmp_path, caplog):
    os.mkfifo(tmp_path / "rank-0.log")
    file = Appender(tmp_path / "rank-0.log")
    file.write(b"first\n")
    assert "rank-0.log cannot be written (No such device or address)" in caplog.text
    reader = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK)
    file.write(b"second\n")
    assert os.read(reader, 100) == b"first\nsecond\n"
    os.close(reader)


@pytest.mark.parametrize("fault", ["a closed pipe", "a full disk"])
def test_printing_never_ends_a_training(fault, monkeypatch, caplog):
    if fault == "a closed pipe":
        reader, number = os.pipe()
        os.close(reader)
    else:
        number = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(number, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with unbreakable_streams():
            for _ in range(3):
                print("step 1", flush=True)
        assert sys.stdout is stream
    (message,) = caplog.messages
    assert message.startswith("the program's stdout cannot be written (")


def test_printing_goes_through_where_all_is_well(monkeypatch):
    reader, number = os.pipe()
    with os.fdopen(number, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with unbreakable_streams():
            print("caf\udce9")
            assert os.read(reader, 100) == b"caf\\udce9\n"  # a line is written at once
    os.close(reader)


def test_a_console_that_is_gone_does_not_end_a_training():
    """A lost terminal closes both streams, and the log handler writes to one of them."""
    reader, number = os.pipe()
    code = (
        "import logging, sys\n"
        "from swin_moe.common.writing import unbreakable_streams\n"
        "logging.getLogger().addHandler(logging.StreamHandler())\n"
        "with unbreakable_streams():\n"
        "    for stream in 2 * (sys.stdout, sys.stderr):\n"
        "        print('step 1', file=stream, flush=True)\n"
        "import os; os._exit(7)\n"
    )
    os.close(reader)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=number, stderr=number, check=False)
    os.close(number)
    assert done.returncode == 7


def test_closed_streams_lead_nowhere(tmp_path):
    code = (
        "import sys\n"
        "from swin_moe.common.writing import open_streams\n"
        "open_streams()\n"
        "print('lost'); print('lost', file=sys.stderr)\n"
        "file = open(sys.argv[1], 'w'); file.write(f'{file.fileno() > 2} {sys.stdin.read()!r}')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "result")]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True)
    assert (tmp_path / "result").read_text() == "True ''"
