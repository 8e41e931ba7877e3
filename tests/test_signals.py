"""Signals at the start, in training, and a second time."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from swin_moe.common import signals
from swin_moe.common.signals import StopSignal
from swin_moe.launch import elastic
from tests.parallel import PATIENCE, ROOT, environment

PROGRAM = """
import os, signal, sys
from swin_moe.common.signals import StopSignal, watch
watch()
what, *numbers = sys.argv[1:]
with StopSignal() as stop:
    if what != "start":
        stop.defer()
    for number in numbers:
        signal.raise_signal(int(number))
    print(stop.name, stop())
"""


def run(what, *numbers, program=PROGRAM, **env):
    return subprocess.run(
        [sys.executable, "-c", program, what, *map(str, map(int, numbers))],
        cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("number", signals.STOPS)
def test_before_the_first_update_the_end_comes_at_once(number, tmp_path):
    done = run("start", number, SWIN_MOE_FINAL=str(tmp_path / "final"))
    cause = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert done.stderr == (
        f"swin-moe: error: {cause} before the first update: nothing is lost, the same command "
        "starts again\n"
    )
    assert done.returncode == (130 if number == signal.SIGINT else 75)
    assert (tmp_path / "final").exists()  # no restart


@pytest.mark.parametrize(
    ("numbers", "printed"),
    [
        ([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], "SIGTERM 2"),
        ([signal.SIGHUP, signal.SIGINT], "SIGHUP 2"),
        ([signal.SIGINT, signal.SIGTERM], "SIGINT 1"),
        ([], " 0"),
    ],
)
def test_in_training_the_first_signal_is_remembered(numbers, printed):
    done = run("training", *numbers)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed + "\n", "")


def test_a_second_interrupt_ends_at_once_in_one_line():
    done = run("training", signal.SIGINT, signal.SIGINT)
    assert (done.returncode, done.stderr) == (130, f"swin-moe: error: {signals.TWICE}\n")


def test_only_one_process_of_a_node_speaks():
    done = run("start", signal.SIGTERM, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (75, "")
    assert run("start", signal.SIGTERM, RANK="nonsense").stderr != ""


@pytest.mark.parametrize(("what", "code"), [("start", 143), ("training", 0)])
def test_when_the_launcher_ends_its_processes_nothing_is_printed_or_saved(tmp_path, what, code):
    (tmp_path / "closing").touch()
    done = run(what, signal.SIGTERM, SWIN_MOE_FINAL=str(tmp_path / "final"))
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout in ("", " 0\n")


def test_ignored_signals_stay_ignored():
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM
    done = run("start", signal.SIGHUP, program=program)  # as under nohup
    assert (done.returncode, done.stdout) == (0, " 0\n")


def test_a_forked_process_dies_by_a_signal_as_any_other():
    program = (
        "import os, signal\nfrom swin_moe.common.signals import watch\nwatch()\n"
        "pid = os.fork()\nif pid == 0: signal.raise_signal(signal.SIGTERM); os._exit(1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert run("", program=program).stdout == "-15\n"


def test_other_programs_than_training_have_the_usual_signals():
    program = (
        "import signal\nfrom swin_moe.common.signals import STOPS, release, watch\n"
        "before = [signal.getsignal(n) for n in STOPS]; watch(); release()\n"
        "assert [signal.getsignal(n) for n in STOPS] == before"
    )
    done = run("", program=program)
    assert done.returncode == 0, done.stderr


def test_a_launch_that_still_checks_asks_to_be_started_again():
    program = (
        "import os, signal, swin_moe.launch.command as launch\n"
        "from swin_moe.cli import main as cli\nfrom swin_moe.common import signals\n"
        "launch.launch = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "signals.watch(); cli.main(['launch', '--on', 'local', 'x.yaml'])"
    )
    done = run("", program=program)
    assert done.returncode == 75
    assert "stopped by SIGTERM before the first update" in done.stderr


def test_one_interrupt_that_is_sent_again_to_new_processes_counts_once(monkeypatch):
    sent = []
    monkeypatch.setattr(elastic, "_signals", [])
    monkeypatch.setattr(elastic._Process, "living", [SimpleNamespace(send_signal=sent.append)])
    monkeypatch.setattr(elastic, "_closing", lambda: Path("nowhere"))
    monkeypatch.setenv(elastic.FINAL, "nowhere/final")
    # It comes while the processes are started.
    start = lambda *_: elastic.pass_on(signal.SIGINT, None)  # noqa: E731
    monkeypatch.setattr(elastic.LocalElasticAgent, "_start_workers", start)
    elastic._Agent._start_workers(object.__new__(elastic._Agent), None)
    assert sent == [signal.SIGINT] * 2
    assert not elastic.interrupted_twice()


def test_handlers_are_restored_after_a_training_within_another_program():
    before = {number: signal.getsignal(number) for number in signals.STOPS}
    with StopSignal() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.name, stop()) == ("SIGUSR1", 2)
    assert {number: signal.getsignal(number) for number in signals.STOPS} == before
