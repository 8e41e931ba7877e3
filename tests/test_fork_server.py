"""The server that forks the ranks: a forked program behaves as in a fresh interpreter."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from swin_moe.common import fork_server
from swin_moe.launch import elastic
from tests import parallel
from tests.parallel import PATIENCE, ROOT, environment

PROGRAM = """
import json, os, random, signal, sys, time
what, *rest = sys.argv[1:]
if what == "report":
    facts = {
        "arguments": rest, "folder": os.getcwd(), "FIRST": os.environ.get("FIRST"),
        "SECOND": os.environ.get("SECOND"), "name": __name__,
        "session": os.getsid(0) == os.getpid(),
        "ignored": signal.getsignal(signal.SIGTERM) is signal.SIG_IGN,
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "preloaded": "colorsys" in sys.modules, "read": sys.stdin.read(), "random": random.random(),
        "comm": open("/proc/self/comm").read().strip(),
    }
    facts["files"] = [n for n in os.listdir("/proc/self/fd") if int(n) > 2]
    print(json.dumps(facts))
    print("to stderr", file=sys.stderr)
elif what == "raise":
    raise KeyError("message")
elif what == "exit":
    sys.exit(int(rest[0]) if rest[0].isdecimal() else rest[0])
elif what == "print":
    import atexit, pathlib, threading
    atexit.register(print, "hook")
    print("now")
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    threading.Timer(0.2, print, ["thread"]).start()
elif what == "wait":
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def server(tmp_path):
    """Start a server that has imported ``colorsys``; FIRST and SECOND are in its environment."""
    with open(os.devnull) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        yield from serving(tmp_path, "colorsys")


def serving(folder, *modules):
    (folder / "program.py").write_text(PROGRAM)
    code = (
        "import sys; from pathlib import Path; from swin_moe.common import fork_server as f; "
        "f.serve(f.listen(Path(sys.argv[1])), 0, sys.argv[2:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "fork"), *modules],
        stdin=subprocess.PIPE, env=environment(FIRST="1", SECOND="2"), cwd=ROOT, close_fds=False,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not listens(folder / "fork"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.stdin.close()
    process.wait(PATIENCE)


def listens(path):
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


def run(folder, *arguments, **options):
    """Fork the program; return it with the files of its output and errors."""
    output, errors = (folder / name for name in ("output", "errors"))
    words = {"environment": environment(FIRST="one"), "folder": folder, "name": "swin-moe r1"}
    with output.open("w") as out, errors.open("w") as err, open(os.devnull) as nothing:
        child = fork_server.Child(
            folder / "fork", "program", arguments, stdin=nothing, stdout=out, stderr=err,
            **(words | options),
        )  # fmt: skip
    return child, output, errors


def test_a_program_gets_the_requested_surroundings(server, tmp_path):
    child, output, errors = run(tmp_path, "report", "a b", "--c")
    assert child.wait(PATIENCE) == 0
    facts = json.loads(output.read_text())
    assert len(facts.pop("files")) == 1  # the folder that is being listed
    assert facts.pop("random") != json.loads(again(tmp_path))["random"]
    assert facts == {
        "arguments": ["a b", "--c"], "folder": str(tmp_path), "FIRST": "one", "SECOND": None,
        "name": "__main__", "session": True, "ignored": False, "interrupt": True,
        "preloaded": True, "read": "", "comm": "swin-moe r1",
    }  # fmt: skip
    assert errors.read_text() == "to stderr\n"


def again(folder):
    child, output, _ = run(folder, "report")
    assert child.wait(PATIENCE) == 0
    return output.read_text()


@pytest.mark.parametrize(
    ("words", "code", "errors"),
    [
        (("exit", "0"), 0, ""),
        (("exit", "75"), 75, ""),
        (("exit", "too bad"), 1, "too bad\n"),
        (("raise",), 1, "KeyError: 'message'\n"),
    ],
)
def test_codes_and_tracebacks_are_those_of_an_interpreter(server, tmp_path, words, code, errors):
    child, _, file = run(tmp_path, *words)
    assert child.wait(PATIENCE) == code
    assert child.poll() == child.returncode == code
    assert file.read_text().endswith(errors)


def wait_for(file, text):
    deadline = time.monotonic() + PATIENCE
    while text not in file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_program_returns_its_signal(server, tmp_path):
    child, output, _ = run(tmp_path, "wait")
    wait_for(output, "ready")
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE) == -signal.SIGTERM
    child.send_signal(signal.SIGKILL)  # without a receiver
    assert server.poll() is None


def test_no_signal_is_lost_however_early(server, tmp_path):
    for _ in range(20):
        child, _, _ = run(tmp_path, "wait")
        os.killpg(child.pid, signal.SIGTERM)  # it has a session of its own already
        assert child.wait(PATIENCE) == -signal.SIGTERM


def test_printed_text_arrives_at_once(server, tmp_path):
    """PYTHONUNBUFFERED is not needed, and the program goes on; its exit hooks run."""
    env = environment()
    env.pop("PYTHONUNBUFFERED", None)
    child, output, _ = run(tmp_path, "print", environment=env)
    wait_for(output, "now")
    assert child.poll() is None
    (tmp_path / "go").touch()
    assert child.wait(PATIENCE) == 0
    assert output.read_text() == "now\nthread\nhook\n"


def test_a_server_needs_a_short_path(monkeypatch, tmp_path):
    folder = tmp_path / ("é" * 60)
    folder.mkdir()
    with pytest.raises(OSError, match="too long"):
        fork_server.start([], folder)


def test_folders_of_launchers_that_were_killed_are_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server.tempfile, "gettempdir", lambda: str(tmp_path))
    dead, foreign = tmp_path / "swin_moe-dead", tmp_path / "swin_moe-foreign"
    for folder in (dead, foreign):
        folder.mkdir()
    (dead / "owner").touch()
    with fork_server.private_folder() as living:
        assert living.parent == tmp_path
        assert living.stat().st_mode & 0o777 == 0o700
        assert dead.exists()  # it may be about to be locked
        for folder in (dead, foreign, living):
            os.utime(folder, (0, 0))
        with fork_server.private_folder():
            assert living.exists()
    assert sorted(tmp_path.iterdir()) == [foreign]


def test_failing_imports_are_left_to_a_fresh_interpreter(tmp_path):
    serve = serving(tmp_path, "no_such_module_at_all")
    next(serve)
    child, output, errors = run(tmp_path, "report")
    assert child.wait(PATIENCE) == 0
    facts = json.loads(output.read_text())
    assert (facts["preloaded"], facts["FIRST"], facts["session"]) == (False, "one", True)
    assert errors.read_text() == "to stderr\n"
    list(serve)


def test_signals_to_all_processes_do_not_end_the_server(server, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        server.send_signal(number)
    child, _, _ = run(tmp_path, "exit", "3")
    assert child.wait(PATIENCE) == 3


def test_without_its_server_a_program_counts_as_killed(server, tmp_path):
    child, output, _ = run(tmp_path, "wait")
    wait_for(output, "ready")
    program = psutil.Process(child.pid)
    server.kill()
    server.wait()
    psutil.wait_procs([program], timeout=PATIENCE)
    assert not program.is_running()
    assert child.wait(PATIENCE) == -signal.SIGKILL
    with pytest.raises(ConnectionError):
        run(tmp_path, "exit", "0")


def _children(process):
    """Return all descendants of a process; none if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _reads_data(rank):
    """Return whether a rank has started the worker that reads data, its last start."""
    for child in _children(rank):
        with contextlib.suppress(psutil.NoSuchProcess):  # such as git, which names the commit
            if child.name() == "pt_data_worker":
                return True
    return False


def _listening(process):
    """Return the addresses at which a process listens; none if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = process.net_connections("inet")
        return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
    return set()


def test_the_launcher_forks_its_ranks_and_leaves_nothing_behind(tmp_path):
    process = parallel.start(
        "swin_moe", *parallel.training(tmp_path / "run", "data.num_workers=1", processes=2),
        processes=2, TMPDIR=str(tmp_path),
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    ranks = []
    while len(ranks) < 2 or not all(map(_reads_data, ranks)):
        ranks = parallel.ranks(process.pid)
        assert process.poll() is None, process.complaints()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = _children(psutil.Process(process.pid))
    assert [rank.name() for rank in ranks] == ["swin-moe r0", "swin-moe r1"]
    (server,) = {rank.parent() for rank in ranks}
    assert server.ppid() == process.pid
    members = (psutil.Process(process.pid), *family)
    assert {address for member in members for address in _listening(member)} == {"127.0.0.1"}
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    psutil.wait_procs(family, timeout=PATIENCE)
    assert not any(member.is_running() for member in family)
    assert not [*tmp_path.glob("swin_moe-*"), *tmp_path.glob("torchelastic_*")]


def test_a_pipe_in_place_of_a_lock_holds_up_no_start(tmp_path):
    folder = tmp_path / f"{fork_server._PREFIX}x"
    folder.mkdir()
    os.mkfifo(folder / fork_server._OWNER)
    os.utime(folder, (0, 0))  # long abandoned
    fork_server.remove_abandoned(tmp_path)  # reading the pipe would block
    assert not folder.exists()
    (folder).symlink_to(tmp_path / "elsewhere")
    fork_server.remove_abandoned(tmp_path)
    assert folder.is_symlink()


@pytest.mark.parametrize(("ended", "closing"), [([None, None], False), ([None, 1], True)])
def test_only_a_failure_takes_the_order_to_save_from_a_signal(
    tmp_path, monkeypatch, ended, closing
):
    """Processes that end because a node joins must save; those after a failure cannot."""
    monkeypatch.setenv(elastic.FINAL, str(tmp_path / "final"))
    group = [SimpleNamespace(poll=lambda code=code: code) for code in ended]
    monkeypatch.setattr(elastic._Process, "group", group)
    monkeypatch.setattr(elastic.SubprocessHandler, "close", lambda *_: None)
    elastic._Process.close(object.__new__(elastic._Process))
    assert (tmp_path / "closing").exists() == closing
