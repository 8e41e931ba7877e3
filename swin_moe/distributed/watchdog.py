"""Finds a process that hangs, reports which ranks it waits for, and ends it.

A hanging rank makes all others wait for it. Each rank finds that out for itself, all at about the
same time, and the launcher then restarts the group. Each rank reports its progress at the store, so
that the others can name the ranks for which they wait.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from ..common import ranks
from ..common.writing import open_to_append
from .work_meter import WorkMeter

HUNG, PREEMPTED = 1, 75  # exit codes; a launcher restarts after the first
START = 2.0  # each part of a start may take this many limits
_GRACE = 10.0  # seconds until faulthandler ends a process in which no Python thread can run
_ANSWER = 8.0  # seconds of silence after a stop signal until the process ends without a save
_BYTES, _SHARE = 1 << 16, 0.005  # bytes moved, and share of time computed: less is no work


class Progress(NamedTuple):
    """The progress of a rank, which it reports to the others.

    Attributes:
        steps: parts, phases and updates so far; equal on ranks that are at the same place.
        works: how often work was seen.
        reports: how often progress was reported.
    """

    steps: int = 0
    works: int = 0
    reports: int = 0

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Progress:
        return cls(*map(int, text.split()))


class Peers(Protocol):
    """The store at which ranks report their progress; used by one thread."""

    rank: int
    size: int
    place: str
    period: float

    def say(self, text: str) -> None: ...
    def hear(self) -> dict[int, str]: ...
    def whose(self, ranks: list[int]) -> str: ...


@dataclass
class Writing:
    """The progress of a checkpoint's write; the writing thread sets it.

    Attributes:
        what: is being written, for messages; empty while nothing is.
        file: is being written.
        good: the last complete checkpoint, for messages.
        moved: time of the last progress.
    """

    what: str = ""
    file: str = ""
    good: str = ""
    moved: float = field(default_factory=time.monotonic)

    def on(self, file: Path | str) -> None:
        """Note that ``file`` is written now."""
        self.file, self.moved = str(file), time.monotonic()


@dataclass
class _Activity:
    """The main thread's activity, and the signs that count as its progress.

    Attributes:
        what: for messages.
        limit: seconds of silence.
        works: the work of this process counts.
        together: the progress of ranks that are not ahead of this one counts.
        writes: the progress of the write counts.
    """

    what: str
    limit: float
    works: bool = False
    together: bool = False
    writes: bool = False


class Watchdog:
    """A watch over this process, which ends it when it has been silent for too long.

    A Python thread reports where the program stands. If a library holds the interpreter and that
    thread cannot run, faulthandler's timer does the same a little later.

    Args:
        limit: seconds of silence in training; 0 = for ever. A start may take twice as long.
        clock: returns seconds.
        meter: measures the work of this process.

    Attributes:
        writing: the write in progress.
        peers: the other ranks; None for a process alone.
        stop_signal: the first stop signal that came; 0 = none.
    """

    def __init__(
        self,
        limit: float,
        rank: int,
        clock: Callable[[], float] = time.monotonic,
        meter: WorkMeter | None = None,
    ) -> None:
        self.limit, self.rank, self._clock = limit, rank, clock
        self.writing = Writing()
        self._steps, self._works, self._reports = 0, 0, 0  # each written by one thread
        self.peers: Peers | None = None
        self.stop_signal, self._stopped_at = 0, 0.0
        self._path: Path | None = None
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._activity = _Activity("the program began", START * limit)
        self._last, self._longest, self._starting = self._clock(), 0.0, True
        self._meter = meter or WorkMeter()
        self._work, self._work_time = self._meter.measure(), self._clock()
        self._warned = ""
        self._heard: list[dict[int, Progress]] = []  # the first and the last of a silence
        self._woken, self._signals = -1, frozenset[int]()

    @property
    def progress(self) -> Progress:
        """The progress of this rank."""
        return Progress(self._steps, self._works, self._reports)

    # ----------------------------------------------------------------------------------------
    # Called by the main thread

    def start(self, signals: Iterable[int] = ()) -> None:
        """Begin to watch.

        Args:
            signals: stop signals. They are noticed even while the main thread is in a library and
                no Python handler can run.
        """
        self._signals = frozenset(signals)
        if self._signals and threading.current_thread() is threading.main_thread():
            self._woken, wake = os.pipe()
            os.set_blocking(wake, False)
            os.set_blocking(self._woken, False)
            signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._go_on()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def log_to(self, path: Path) -> None:
        """Write the stacks of a hang to ``path`` instead of stderr, if it can be written."""
        with contextlib.suppress(OSError):  # the log reports it
            self._file, self._path = io.TextIOWrapper(open_to_append(path), "utf-8"), path
        self._go_on()

    def meet(self, peers: Peers | None) -> None:
        """Exchange the progress with other ranks from now on."""
        if peers is not None:
            self.peers = peers
            threading.Thread(target=self._exchange, name="pulse", daemon=True).start()

    def enter(self, what: str, works: bool = False) -> None:
        """Begin a part of the start.

        Args:
            what: for messages, after "nothing went on while".
            works: the work of this process, and of ranks that are not ahead of it, is progress.
        """
        self._steps += 1
        self._activity = _Activity(what, START * self.limit, works, together=works)
        self._starting = True
        self._go_on()

    def beat(self) -> None:
        """Note that an update was made."""
        if self._starting:
            self._starting, self._activity = False, _Activity("training", self.limit)
        else:
            self._longest = max(self._longest, self._clock() - self._last)
        self._steps += 1
        self._go_on()

    def doing(self, what: str) -> None:
        """Name the part of an update that begins; this is no progress."""
        self._activity.what = what

    @contextlib.contextmanager
    def phase(
        self, what: str, *, works: bool = False, writes: bool = False, limits: float = 1.0
    ) -> Iterator[None]:
        """Return a context for a wait that may be longer than an update, as it makes progress.

        Args:
            what: for messages, after "nothing went on while".
            works: the work of this process and of the others is progress.
            writes: the write's progress counts.
            limits: seconds of silence, in units of the limit of an update.
        """
        before = self._activity
        self._steps += 1
        limit = max(limits * self.limit, before.limit if self._starting else 0.0)
        self._activity = _Activity(what, limit, works, True, writes)
        self._go_on()
        yield
        self._activity = before
        self._steps += 1
        self._go_on()

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self._path is not None:
            self._file.close()
        if self._woken >= 0:
            signal.set_wakeup_fd(-1)

    def wait_goes_on(self) -> None:
        """Note that a wait with its own limit goes on; calls of other threads do nothing."""
        if threading.get_ident() == self._main:
            self._go_on()

    def _go_on(self) -> None:
        self._last = self._clock()
        self._heard.clear()
        if limit := self._activity.limit:
            file = sys.stderr if self._path is None else self._file
            # A replaced or closed stderr cannot take the report.
            with contextlib.suppress(AttributeError, ValueError, OSError, RuntimeError):
                faulthandler.dump_traceback_later(limit + _GRACE, exit=True, file=file)

    # ----------------------------------------------------------------------------------------
    # Called by the watching threads

    def _watch(self) -> None:
        # sigpending() reports only signals that this thread blocks.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        while not self._ended.wait(min(self.limit / 10, 1.0) if self.limit else 1.0):
            self.look()

    def _exchange(self) -> None:
        while not self._ended.wait(self._period()):
            # If the store or a rank is gone, the main thread meets the same error.
            with contextlib.suppress(Exception):
                self.exchange()

    def _period(self) -> float:
        assert self.peers is not None
        return min(self.limit / 8 or math.inf, self.peers.period)

    def exchange(self) -> None:
        """Report this rank's progress, and read that of the others if this rank is silent."""
        assert self.peers is not None
        self._reports += 1
        self.peers.say(str(self.progress))
        if self._clock() - self._last > self._period() / 2:
            heard = {rank: Progress.parse(text) for rank, text in self.peers.hear().items()}
            self._heard[1:] = [heard]

    def look(self) -> None:
        """Note stop signals, and end the process if it has been silent for too long."""
        self._take_signals()
        now, activity = self._clock(), self._activity
        if self._went_on(activity, now):
            self._go_on()
        silent = now - self._last
        answer = max(_ANSWER, 3 * self._longest)
        if self.stop_signal and min(silent, now - self._stopped_at) > answer:
            self._end(activity, PREEMPTED, silent)
        elif activity.limit and silent > activity.limit:
            self._end(activity, PREEMPTED if self.stop_signal else HUNG, silent)
        elif self.limit and not activity.writes:
            self._warn_of_write(now)

    def _take_signals(self) -> None:
        came: list[int] = []
        with contextlib.suppress(OSError):
            came += [number for number in os.read(self._woken, 512) if number in self._signals]
        # The main thread takes no signals while it waits for a file system that does not answer.
        came += signal.sigpending() & self._signals
        if came:
            self.note_signal(came[0])

    def note_signal(self, number: int) -> None:
        """Note that a stop signal has come; only the first one counts."""
        if not self.stop_signal:
            self.stop_signal, self._stopped_at = number, self._clock()

    def _went_on(self, activity: _Activity, now: float) -> bool:
        """Return whether there was progress since the last one that was noted."""
        if activity.writes and self.writing.what and self.writing.moved > self._last:
            return self._worked()
        work, before = self._meter.measure(), self._work
        enough = work.cpu - before.cpu > max(_SHARE * (now - self._work_time), 0.001)
        if work.place == before.place:  # the call may be a busy wait
            enough = False
        if enough or work.moved - before.moved > _BYTES:
            self._work, self._work_time = work, now
            if activity.works:
                return self._worked()
        quiet = now - self._last > activity.limit / 4
        if activity.works and quiet and self._meter.children_computed():
            return self._worked()
        heard = list(self._heard)
        if activity.together and len(heard) == 2:
            first, last = heard
            behind = [
                rank
                for rank, progress in last.items()
                if rank != self.rank and progress.steps <= self._steps
            ]
            return any(rank not in first or last[rank][:2] != first[rank][:2] for rank in behind)
        return False

    def _worked(self) -> bool:
        self._works += 1
        return True

    def _warn_of_write(self, now: float) -> None:
        writing = self.writing
        if writing.what and now - writing.moved > self.limit and writing.what != self._warned:
            self._warned = writing.what
            self._print(
                f"warning: rank {self.rank} on {ranks.hostname()}: {writing.what} has not gone on "
                f"for {self.limit:g} s ({writing.file}): does that file system answer? Training "
                "goes on until it must save again"
            )

    def _print(self, text: str) -> None:
        _bounded(lambda: print(f"swin-moe: {text}", file=sys.stderr, flush=True))

    def _end(self, activity: _Activity, code: int, silent: float) -> None:
        who = f"rank {self.rank} on {ranks.hostname()}"
        what, writing = activity.what, self.writing
        if activity.writes and writing.what:
            what = f"{writing.what} was awaited ({writing.file})"
        awaited = self._awaited()
        if code == PREEMPTED and ranks.being_closed():  # another process has failed
            os._exit(128 + self.stop_signal)
        if code == PREEMPTED:  # the launcher, which has the signal too, decides on a restart
            name = signal.Signals(self.stop_signal).name
            lost = f"{writing.what} did not finish" if writing.what else "nothing was saved"
            good = "no checkpoint of this run is complete: the same command starts it again"
            if writing.good:
                good = f"the last good checkpoint is {writing.good}: start again to go on from it"
            self._print(
                f"error: {who}: stopped by {name}, but nothing went on for {silent:.0f} s "
                f"while {what}{awaited}; {lost}; {good}"
            )
            os._exit(128 + signal.SIGINT if self.stop_signal == signal.SIGINT else code)
        place = self._place()
        stacks = f"; the stacks are in {self._path}" if self._path else ""
        self._print(
            f"error: {who}: nothing went on for {activity.limit:g} s while {what}, at {place}"
            f"{awaited}{stacks}"
        )
        stacks = _stacks()
        _bounded(lambda: print(stacks, file=self._file if self._path else sys.stderr, flush=True))
        time.sleep(min(self.limit / 4, 5.0))  # or the others report a lost peer, not a hang
        os._exit(code)

    def _place(self) -> str:
        frame = sys._current_frames()[self._main]
        stack = traceback.extract_stack(frame)
        ours = [entry for entry in stack if f"{os.sep}swin_moe{os.sep}" in entry.filename]
        place = (ours or stack)[-1]
        return f"{Path(place.filename).name}:{place.lineno} ({place.name})"

    def _awaited(self) -> str:
        """Return a clause that names the late ranks, or an empty one."""
        peers, heard = self.peers, list(self._heard)
        if peers is None:
            return ""
        found: list[str] = []

        def ask() -> None:
            late = self._late(heard, peers.size)
            if late:
                found.append(peers.whose(late))

        if not _bounded(ask) or len(heard) < 2:
            return f"; the store of rank 0 at {peers.place} does not answer"
        if not found:
            return ""
        return f"; awaited: {found[0]}; {ranks.world_variables()}"

    def _late(self, heard: list[dict[int, Progress]], size: int) -> list[int]:
        """Return the ranks that are behind this one, have stopped to report, or never reported."""
        if len(heard) < 2:
            return []
        first, last = heard

        def is_late(rank: int) -> bool:
            if rank not in last:
                return True
            stopped = rank in first and last[rank].reports == first[rank].reports
            return stopped or last[rank].steps < self._steps

        return [rank for rank in range(size) if rank != self.rank and is_late(rank)]


def _bounded(call: Callable[[], object]) -> bool:
    """Make a call that may hang, such as a write to a dead file system.

    Returns:
        Whether it returned within 3 seconds.
    """
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(3.0)
    return not thread.is_alive()


def _stacks() -> str:
    """Return the stacks of all threads. faulthandler would stop every thread while it writes."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread 0x{ident:x} ({names.get(ident, 'unknown')}):\n"
        + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )


_current: Watchdog | None = None


def start(limit: float, rank: int, signals: Iterable[int] = ()) -> Watchdog:
    """Start the watch over this process and return it."""
    global _current
    _current = Watchdog(limit, rank)
    _current.start(signals)
    return _current


def going_on() -> None:
    """Note that a wait with its own limit goes on; may be called from anywhere."""
    if _current is not None:
        _current.wait_goes_on()
