"""The watch over progress: what counts as going on, and what is said when nothing does."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from swin_moe.common import ranks
from swin_moe.distributed import watchdog
from swin_moe.distributed.watchdog import Watchdog
from tests.parallel import PATIENCE, ROOT, environment

HANG = """
import time
from pathlib import Path
from swin_moe.distributed.watchdog import Watchdog

def waits_for_ever():
    {wait}

dog = Watchdog(1.0, 3)
dog.start()
dog.log_to(Path({log!r}))
dog.beat()
with dog.phase("it was slow", works=True, limits=3):
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
    """In place of the end of the process."""


class Peers:
    """Another rank, which says what the test wants."""

    rank, place, period = 0, "node-0:29500", 2.0

    def __init__(self) -> None:
        self.said: dict[int, str] = {}

    def hear(self):
        return self.said

    def whose(self, late):
        return f"node-1 (ranks {late})"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def dog(clock, monkeypatch):
    """One of ten seconds that never looks by itself and sees no work."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Watchdog, "_worked_so_far", lambda self: (clock(), 0.0, 0, None))
    monkeypatch.setattr(Watchdog, "_children_work", lambda self: False)
    monkeypatch.setattr(watchdog, "_stacks", str)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    dog = Watchdog(10.0, 0, clock)
    dog.writing.moved = 0.0
    return dog


def later(clock, dog, seconds):
    clock.now += seconds
    dog.look()


def test_a_start_has_twice_the_limit_and_names_what_it_did(clock, dog, capsys):
    dog.enter("the first batch was awaited")
    later(clock, dog, 19.0)
    with pytest.raises(Ended, match="1"):
        later(clock, dog, 2.0)
    error = capsys.readouterr().err
    assert error.startswith(
        f"swin-moe: error: rank 0 on {ranks.hostname()}: nothing went on for 20 s while the first "
        "batch was awaited, at "
    )
    assert len(error.split()) > 20
    assert len(error.strip().splitlines()) == 1


def test_an_update_ends_the_start(clock, dog, capsys):
    dog.enter("the first batch was awaited")
    clock.now = 15.0
    dog.beat()
    later(clock, dog, 9.0)
    with pytest.raises(Ended):
        later(clock, dog, 2.0)
    assert "nothing went on for 10 s while training" in capsys.readouterr().err


def test_own_work_counts_where_a_phase_works_and_nowhere_else(clock, dog, monkeypatch):
    work = [0.0, 0, 0]  # seconds computed, bytes moved, place in the program
    monkeypatch.setattr(Watchdog, "_worked_so_far", lambda self: (clock(), *work))
    dog._work = dog._worked_so_far()
    dog.enter("data was indexed", works=True)
    for place in range(5):
        work[0], work[2] = work[0] + 1.0, place + 1
        later(clock, dog, 15.0)
    work[1] += 1 << 20
    later(clock, dog, 15.0)
    work[0] += 15.0  # busily in one call, as those are that wait for a GPU
    with pytest.raises(Ended):
        later(clock, dog, 21.0)
    dog.enter("the first batch was awaited")
    work[0], work[2] = work[0] + 15.0, 9
    with pytest.raises(Ended):
        later(clock, dog, 21.0)


def hear(dog, *texts):
    dog._heard[:] = [{0: [dog._mark, 0, 0], 1: [*map(int, text.split())]} for text in texts]


def test_the_work_of_others_counts_and_those_that_stopped_are_named(clock, dog, capsys):
    dog._peers = Peers()
    dog.enter("the model was built", works=True)
    mark = dog._mark
    for done in range(3):
        hear(dog, f"{mark - 1} {done} {done}", f"{mark - 1} {done + 1} {done + 1}")
        later(clock, dog, 15.0)
    hear(dog, f"{mark + 1} 1 1", f"{mark + 1} 2 2")  # it is further: that cannot be waited for
    later(clock, dog, 15.0)
    hear(dog, f"{mark - 1} 7 8", f"{mark - 1} 7 8")
    with pytest.raises(Ended):
        later(clock, dog, 10.0)
    assert "; awaited: node-1 (ranks [1]); " in capsys.readouterr().err


def test_a_rank_of_equal_place_that_says_nothing_any_more_is_named(clock, dog, capsys):
    dog._peers = Peers()
    dog.enter("the model was built", works=True)
    hear(dog, f"{dog._mark} 0 4", f"{dog._mark} 0 5")
    with pytest.raises(Ended):
        later(clock, dog, 21.0)
    assert "awaited" not in capsys.readouterr().err
    hear(dog, f"{dog._mark} 0 5", f"{dog._mark} 0 5")
    with pytest.raises(Ended):
        dog.look()
    assert "; awaited: node-1 (ranks [1]); " in capsys.readouterr().err


def test_a_save_may_take_long_but_not_stand_still(clock, dog, capsys):
    dog.beat()
    dog.writing.what, dog.writing.file = "the save of step 7", "runs/x/file"
    with dog.phase("a checkpoint was copied", writes=True):
        for _ in range(5):
            clock.now += 9.0
            dog.writing.moved = clock.now
            dog.look()
        with pytest.raises(Ended, match="1"):
            later(clock, dog, 11.0)
    error = capsys.readouterr().err
    assert "for 10 s while the save of step 7 was awaited (runs/x/file), at " in error


def test_a_write_that_stalls_behind_the_training_is_said_once(clock, dog, capsys):
    dog.beat()
    dog.writing.what, dog.writing.file = "the save of step 7", "runs/x/file"
    for _ in range(5):
        later(clock, dog, 6.0)
        dog.beat()
    assert capsys.readouterr().err == (
        "swin-moe: warning: rank 0 on "
        f"{ranks.hostname()}: the save of step 7 has not gone on for 10 s (runs/x/file): does that "
        "file system answer? Training goes on until it must save again\n"
    )


def test_a_signal_is_answered_while_a_save_stands_still(clock, dog, capsys):
    dog.beat()
    dog.writing.what, dog.writing.file = "the save of step 7", "runs/x/file"
    dog.writing.good = "runs/x/checkpoints/step-00000003"
    with dog.phase("a checkpoint was copied", writes=True):
        clock.now = 1.0
        dog._signal, dog._asked = signal.SIGTERM, clock.now
        later(clock, dog, 7.0)
        with pytest.raises(Ended, match="75"):
            later(clock, dog, 1.5)
    error = capsys.readouterr().err
    assert "told to stop by SIGTERM, but nothing went on for 10 s while the save of step 7" in error
    assert error.endswith(
        "; the save of step 7 did not finish; the last good checkpoint is "
        "runs/x/checkpoints/step-00000003: start again to go on from it\n"
    )


def test_an_update_after_a_signal_may_take_what_updates_take(clock, dog):
    dog.limit = 1000.0
    dog.beat()
    clock.now += 20.0
    dog.beat()
    dog._signal, dog._asked = signal.SIGTERM, clock.now
    later(clock, dog, 50.0)
    with pytest.raises(Ended, match="75"):
        later(clock, dog, 11.0)


def test_a_signal_is_noticed_while_the_main_thread_is_busy():
    """The number comes through a pipe; no handler of Python has to run for that."""
    former = signal.signal(signal.SIGUSR1, lambda *_: None)
    dog = Watchdog(0.0, 0)
    dog.start([signal.SIGUSR1])
    try:
        signal.raise_signal(signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        while not dog._signal and time.monotonic() < deadline:
            time.sleep(0.01)
        assert dog._signal == signal.SIGUSR1
    finally:
        dog.stop()
        signal.signal(signal.SIGUSR1, former)


def test_a_signal_is_noticed_though_the_main_thread_does_not_take_it():
    """So it is while that thread waits for a disk: no signal reaches even its C library."""
    former = signal.signal(signal.SIGUSR1, lambda *_: None)
    dog = Watchdog(0.0, 0)
    dog._signals = frozenset([signal.SIGUSR1])
    signal.pthread_sigmask(signal.SIG_BLOCK, dog._signals)
    try:
        dog._take_signals()
        assert dog._signal == 0
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        dog._take_signals()
        assert dog._signal == signal.SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, dog._signals)
        signal.signal(signal.SIGUSR1, former)


def test_work_is_seen():
    dog = Watchdog(10.0, 0)
    begun = dog._worked_so_far()
    deadline = time.monotonic() + PATIENCE
    while dog._worked_so_far()[1] == begun[1] and time.monotonic() < deadline:
        sum(range(10_000))
    Path(__file__).read_bytes()
    now = dog._worked_so_far()
    assert now[1] > begun[1]
    assert now[2] - begun[2] > 1000
    assert threading.get_ident() == dog._main


def test_looking_is_no_work():
    """What the watch reads to see whether there was work must not count as such."""
    dog = Watchdog(10.0, 0)
    seen = []

    def look():
        seen.append(dog._worked_so_far()[2])
        for _ in range(20):
            dog._children_work()
        seen.append(dog._worked_so_far()[2])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen[1] - seen[0] < 1000
