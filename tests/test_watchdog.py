"""The watch over progress: the signs that count, and the error of a process without any."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from swin_moe.common import ranks
from swin_moe.distributed import watchdog as module
from swin_moe.distributed.watchdog import Watchdog
from swin_moe.distributed.work_meter import Work, WorkMeter
from tests.parallel import PATIENCE, ROOT, environment

HANG = """
import time
from pathlib import Path
from swin_moe.distributed.watchdog import Watchdog

def waits_for_ever():
    {wait}

watchdog = Watchdog(1.0, 3)
watchdog.start()
watchdog.log_to(Path({log!r}))
watchdog.beat()
with watchdog.phase("it was slow", works=True, limits=30):
    time.sleep(1.5)
waits_for_ever()
"""


@pytest.mark.parametrize("wait", ["time.sleep(60)", "while True: pass"])
def test_a_hang_ends_with_the_stacks_in_the_log(tmp_path, wait):
    log = tmp_path / "rank-3.log"
    done = subprocess.run(
        [sys.executable, "-c", HANG.format(wait=wait, log=str(log))],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"swin-moe: error: rank 3 on {ranks.hostname()}: nothing went on")
    assert "nothing went on for 1 s while training, at " in done.stderr
    assert str(log) in done.stderr
    assert "waits_for_ever" in done.stderr
    assert "waits_for_ever" in log.read_text()


class Ended(Exception):
    """Raised instead of an end of the process."""


class Peers:
    """A store with the progress of other ranks, which the test sets."""

    rank, size, place, period = 0, 2, "node-0:29500", 2.0

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    def say(self, text):
        self.texts[0] = text

    def hear(self):
        return self.texts

    def whose(self, late):
        return f"node-1 (ranks {late})"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Meter(WorkMeter):
    """A meter that shows the work that the test sets; no children compute."""

    def __init__(self) -> None:
        self.work = Work(0.0, 0, None)

    def measure(self):
        return self.work

    def children_computed(self):
        return False


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter():
    return Meter()


@pytest.fixture
def watchdog(clock, meter, monkeypatch, tmp_path):
    """A watchdog with a limit of 10 seconds and no thread: it looks when the test calls it."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(module.os, "_exit", end)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    watchdog = Watchdog(10.0, 0, clock, meter)
    watchdog.log_to(tmp_path / "rank-0.log")
    watchdog.writing.moved = 0.0
    yield watchdog
    watchdog.stop()


def later(clock, watchdog, seconds):
    clock.now += seconds
    watchdog.look()


def test_a_start_has_twice_the_limit_and_names_what_it_did(clock, watchdog, capsys):
    watchdog.enter("the first batch was awaited")
    later(clock, watchdog, 19.0)
    with pytest.raises(Ended, match="1"):
        later(clock, watchdog, 2.0)
    error = capsys.readouterr().err
    assert error.startswith(
        f"swin-moe: error: rank 0 on {ranks.hostname()}: nothing went on for 20 s while the first "
        "batch was awaited, at "
    )
    assert len(error.split()) > 20
    assert len(error.strip().splitlines()) == 1


def test_an_update_ends_the_start(clock, watchdog, capsys):
    watchdog.enter("the first batch was awaited")
    clock.now = 15.0
    watchdog.beat()
    later(clock, watchdog, 9.0)
    with pytest.raises(Ended):
        later(clock, watchdog, 2.0)
    assert "nothing went on for 10 s while training" in capsys.readouterr().err


def test_own_work_counts_in_a_phase_that_works_and_nowhere_else(clock, watchdog, meter):
    watchdog.enter("data was indexed", works=True)
    for second in range(1, 6):
        meter.work = Work(cpu=second, moved=0, place=second)
        later(clock, watchdog, 15.0)
    meter.work = Work(cpu=5.0, moved=1 << 20, place=5)
    later(clock, watchdog, 15.0)
    meter.work = Work(cpu=20.0, moved=1 << 20, place=5)  # a busy wait, as for a GPU
    with pytest.raises(Ended):
        later(clock, watchdog, 21.0)
    watchdog.enter("the first batch was awaited")
    meter.work = Work(cpu=35.0, moved=1 << 20, place=9)
    with pytest.raises(Ended):
        later(clock, watchdog, 21.0)


def hear(clock, watchdog, *texts):
    """Let rank 1 report ``texts``, one after another, within a second of silence."""
    clock.now += 1.0
    for text in texts:
        watchdog.peers.texts[1] = text
        watchdog.exchange()


def test_the_work_of_others_counts_and_those_that_stopped_are_named(clock, watchdog, capsys):
    watchdog.peers = Peers()
    watchdog.enter("the model was built", works=True)
    steps = watchdog.progress.steps
    for works in range(3):
        behind = f"{steps - 1} {works} {works}", f"{steps - 1} {works + 1} {works + 1}"
        hear(clock, watchdog, *behind)
        later(clock, watchdog, 15.0)
    hear(clock, watchdog, f"{steps + 1} 1 1", f"{steps + 1} 2 2")  # ahead: it does not count
    with pytest.raises(Ended):
        later(clock, watchdog, 21.0)
    watchdog.enter("the model was built", works=True)
    hear(clock, watchdog, f"{steps} 7 8", f"{steps} 7 8")
    with pytest.raises(Ended):
        later(clock, watchdog, 21.0)
    assert "; awaited: node-1 (ranks [1]); " in capsys.readouterr().err


def test_a_rank_at_the_same_place_is_named_if_it_reports_nothing(clock, watchdog, capsys):
    watchdog.peers = Peers()
    for reports, named in ((("0 4", "0 5"), False), (("0 5", "0 5"), True)):
        watchdog.enter("the model was built", works=True)
        steps = watchdog.progress.steps
        hear(clock, watchdog, *(f"{steps} {report}" for report in reports))
        with pytest.raises(Ended):
            later(clock, watchdog, 21.0)
        assert ("; awaited: node-1 (ranks [1]); " in capsys.readouterr().err) == named


def test_a_rank_that_stopped_before_its_first_report_is_named(clock, watchdog, capsys):
    watchdog.peers = Peers()
    watchdog.beat()
    clock.now += 2.0
    watchdog.exchange()
    watchdog.exchange()
    with pytest.raises(Ended):
        later(clock, watchdog, 21.0)
    assert "; awaited: node-1 (ranks [1]); " in capsys.readouterr().err


def test_a_save_may_take_long_but_not_stand_still(clock, watchdog, capsys):
    watchdog.beat()
    watchdog.writing.what, watchdog.writing.file = "the save of step 7", "runs/x/file"
    with watchdog.phase("a checkpoint was copied", writes=True):
        for _ in range(5):
            clock.now += 9.0
            watchdog.writing.moved = clock.now
            watchdog.look()
        with pytest.raises(Ended, match="1"):
            later(clock, watchdog, 11.0)
    error = capsys.readouterr().err
    assert "for 10 s while the save of step 7 was awaited (runs/x/file), at " in error


def test_a_write_that_stalls_behind_the_training_is_reported_once(clock, watchdog, capsys):
    watchdog.beat()
    watchdog.writing.what, watchdog.writing.file = "the save of step 7", "runs/x/file"
    for _ in range(5):
        later(clock, watchdog, 6.0)
        watchdog.beat()
    assert capsys.readouterr().err == (
        "swin-moe: warning: rank 0 on "
        f"{ranks.hostname()}: the save of step 7 has not gone on for 10 s (runs/x/file): does that "
        "file system answer? Training goes on until it must save again\n"
    )


def test_a_signal_is_answered_while_a_save_stands_still(clock, watchdog, capsys):
    watchdog.beat()
    watchdog.writing.what, watchdog.writing.file = "the save of step 7", "runs/x/file"
    watchdog.writing.good = "runs/x/checkpoints/step-00000003"
    with watchdog.phase("a checkpoint was copied", writes=True):
        clock.now = 1.0
        watchdog.note_signal(signal.SIGTERM)
        later(clock, watchdog, 7.0)
        with pytest.raises(Ended, match="75"):
            later(clock, watchdog, 1.5)
    error = capsys.readouterr().err
    assert "stopped by SIGTERM, but nothing went on for 10 s while the save of step 7" in error
    assert error.endswith(
        "; the save of step 7 did not finish; the last good checkpoint is "
        "runs/x/checkpoints/step-00000003: start again to go on from it\n"
    )


def test_an_update_after_a_signal_may_take_as_long_as_updates_do(clock, watchdog):
    watchdog.limit = 1000.0
    watchdog.beat()
    clock.now += 20.0
    watchdog.beat()
    watchdog.note_signal(signal.SIGTERM)
    later(clock, watchdog, 50.0)
    with pytest.raises(Ended, match="75"):
        later(clock, watchdog, 11.0)


@pytest.fixture
def handled():
    """SIGUSR1 with a handler, so that it ends no test."""
    former = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, former)


@pytest.mark.usefixtures("handled")
def test_a_signal_is_noticed_while_the_main_thread_is_busy():
    """The number comes through a pipe: no Python handler has to run."""
    watchdog = Watchdog(0.0, 0)
    watchdog.start([signal.SIGUSR1])
    try:
        signal.raise_signal(signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        while not watchdog.stop_signal and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watchdog.stop_signal == signal.SIGUSR1
    finally:
        watchdog.stop()


@pytest.mark.usefixtures("handled")
def test_a_signal_is_noticed_while_it_is_blocked():
    """A main thread that waits for a disk takes no signals either."""
    watchdog = Watchdog(0.0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    watchdog.start([signal.SIGUSR1])
    try:
        watchdog.look()
        assert watchdog.stop_signal == 0
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        watchdog.look()
        assert watchdog.stop_signal == signal.SIGUSR1
    finally:
        watchdog.stop()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def test_work_is_measured():
    meter = WorkMeter()
    before = meter.measure()
    deadline = time.monotonic() + PATIENCE
    while meter.measure().cpu == before.cpu and time.monotonic() < deadline:
        sum(range(10_000))
    Path(__file__).read_bytes()
    now = meter.measure()
    assert now.cpu > before.cpu
    assert now.moved - before.moved > 1000


def test_a_measurement_is_no_work():
    meter = WorkMeter()
    moved = []

    def measure():
        moved.append(meter.measure().moved)
        for _ in range(20):
            meter.children_computed()
        moved.append(meter.measure().moved)

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert moved[1] - moved[0] < 1000
