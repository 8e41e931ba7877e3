"""Finds a process that hangs, reports who waits for what, and ends the process.

A hanging rank makes all others wait for it. All of them find out at about the same time, each for
itself, and the launcher then restarts the group. Each rank reports its progress at the store, which
shows which ranks the others wait for.
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
from typing import Protocol

import psutil

from ..common import ranks
from ..common.writing import open_to_append

HUNG, PREEMPTED = 1, 75  # exit codes; a launcher restarts after the first
START = 2.0  # each part of a start may take this many limits
_GRACE = 10.0  # seconds until the process is ended where not even Python's threads run
_ANSWER = 8.0  # seconds of silence after a signal until the process ends without having saved
_BYTES, _SHARE = 1 << 16, 0.005  # bytes moved, and share of time computed: less is no work


class Peers(Protocol):
    """The other ranks, asked by a thread of its own."""

    rank: int
    place: str
    period: float

    def say(self, text: str) -> None: ...
    def hear(self) -> dict[int, str]: ...
    def whose(self, ranks: list[int]) -> str: ...


@dataclass
class Writing:
    """The write that a thread makes meanwhile, as it notes itself.

    Attributes:
        what: for people; empty while nothing is written. file: being written. good: where to go on
            from if the write never ends. moved: when it last went on.
    """

    what: str = ""
    file: str = ""
    good: str = ""
    moved: float = field(default_factory=time.monotonic)

    def on(self, file: Path | str) -> None:
        self.file, self.moved = str(file), time.monotonic()


@dataclass
class _Doing:
    """What the main thread does, for messages; and what else counts as progress.

    Attributes:
        limit: seconds of silence. works: its own work. together: that of ranks that are not further
            than this one. writes: the progress of the write.
    """

    what: str
    limit: float
    works: bool = False
    together: bool = False
    writes: bool = False


class Watchdog:
    """Ends the process when it has been silent for too long.

    A Python thread reports where the program stands. If that thread cannot run either, because a
    library holds the interpreter, the C library's timer does the same a little later.

    Args:
        limit: seconds of silence in training; 0 = for ever. A start may take twice as long.
        clock: for tests.
    """

    def __init__(
        self, limit: float, rank: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit, self.rank, self._clock = limit, rank, clock
        self.writing = Writing()
        self._path: Path | None = None
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._doing = _Doing("the program began", START * limit)
        self._last, self._longest, self._starting = self._clock(), 0.0, True
        self._mark, self._done, self._pulses = 0, 0, 0  # steps that all ranks take; own work
        self._work, self._children = self._worked_so_far(), 0.0
        self._signal, self._asked = 0, 0.0
        self._warned = ""
        self._peers: Peers | None = None
        self._heard: list[dict[int, list[int]]] = []  # the first and the last of a silence
        self._woken, self._signals = -1, frozenset[int]()

    # ----------------------------------------------------------------------------------------
    # What the main thread says

    def start(self, signals: Iterable[int] = ()) -> None:
        """Begin to watch.

        Args:
            signals: those that ask the program to save and end. They are noticed even while the
                main thread is in a library and no handler of Python can run.
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
        """The file that gets the stacks; until then, or if it cannot be written, stderr does."""
        with contextlib.suppress(OSError):  # the log itself has said so
            self._file, self._path = io.TextIOWrapper(open_to_append(path), "utf-8"), path
        self._go_on()

    def meet(self, peers: Peers | None) -> None:
        """Other ranks, which say what they do as this one does."""
        if peers is not None:
            self._peers = peers
            threading.Thread(target=self._exchange, name="pulse", daemon=True).start()

    def enter(self, what: str, works: bool = False) -> None:
        """Begin a part of the start.

        Args:
            what: for people, after "nothing went on while".
            works: the work of this process, and of others that are not further, is a sign of life.
        """
        self._mark += 1
        self._doing = _Doing(what, START * self.limit, works, together=works)
        self._starting = True
        self._go_on()

    def beat(self) -> None:
        """Say that the training goes on: an update was made."""
        if self._starting:
            self._starting, self._doing = False, _Doing("training", self.limit)
        else:
            self._longest = max(self._longest, self._clock() - self._last)
        self._mark += 1
        self._go_on()

    def doing(self, what: str) -> None:
        """Name what an update does now; this is no sign of life."""
        self._doing.what = what

    @contextlib.contextmanager
    def phase(
        self, what: str, *, works: bool = False, writes: bool = False, limits: float = 1.0
    ) -> Iterator[None]:
        """A wait that may be longer than an update as long as something goes on.

        Args:
            works: the work of this process and of the others. writes: the write's progress.
            limits: how many limits of silence it may have.
        """
        before = self._doing
        self._mark += 1
        limit = max(limits * self.limit, before.limit if self._starting else 0.0)
        self._doing = _Doing(what, limit, works, True, writes)
        self._go_on()
        yield
        self._doing = before
        self._mark += 1
        self._go_on()

    def stop(self) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self._path is not None:
            self._file.close()
        if self._woken >= 0:
            signal.set_wakeup_fd(-1)

    def _go_on(self) -> None:
        self._last = self._clock()
        self._heard.clear()
        if limit := self._doing.limit:
            file = sys.stderr if self._path is None else self._file
            # Where stderr is replaced or closed there is nowhere to report to.
            with contextlib.suppress(AttributeError, ValueError, OSError, RuntimeError):
                faulthandler.dump_traceback_later(limit + _GRACE, exit=True, file=file)

    # ----------------------------------------------------------------------------------------
    # In the threads

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)  # else none is seen as pending
        while not self._ended.wait(min(self.limit / 10, 1.0) if self.limit else 1.0):
            self._take_signals()
            self.look()

    def _exchange(self) -> None:
        assert self._peers is not None
        period = min(self.limit / 8 or math.inf, self._peers.period)
        while not self._ended.wait(period):
            self._pulses += 1
            try:
                self._peers.say(f"{self._mark} {self._done} {self._pulses}")
                if self._clock() - self._last > period / 2:
                    said = self._peers.hear()
                    heard = {rank: [*map(int, text.split())] for rank, text in said.items()}
                    self._heard[1:] = [heard]
            except Exception:  # the store is gone, or a rank; that is for the main thread to meet
                continue

    def _take_signals(self) -> None:
        came: list[int] = []
        with contextlib.suppress(OSError):
            came += [number for number in os.read(self._woken, 512) if number in self._signals]
        # The main thread takes none while it waits for a file system that does not answer.
        came += signal.sigpending() & self._signals
        if came and not self._signal:
            self._signal, self._asked = came[0], self._clock()

    def look(self) -> None:
        """End the process if it has been silent for too long."""
        now, doing = self._clock(), self._doing
        if self._went_on(doing, now):
            self._go_on()
        silent = now - self._last
        if self._signal and min(silent, now - self._asked) > max(_ANSWER, 3 * self._longest):
            self._end(doing, PREEMPTED, silent)
        elif doing.limit and silent > doing.limit:
            self._end(doing, PREEMPTED if self._signal else HUNG, silent)
        elif self.limit and not doing.writes:
            self._warn_of_write(now)

    def _went_on(self, doing: _Doing, now: float) -> bool:
        """Whether something that counts in this phase has happened since the last sign of life."""
        if doing.writes and self.writing.what and self.writing.moved > self._last:
            self._done += 1
            return True
        work, before = self._worked_so_far(), self._work
        enough = work[1] - before[1] > max(_SHARE * (now - before[0]), 0.001)
        if enough and work[3] == before[3]:  # long in one call: it may only be waiting busily
            enough = False
        if enough or work[2] - before[2] > _BYTES:
            self._work = work
            if doing.works:
                self._done += 1
                return True
        if doing.works and now - self._last > doing.limit / 4 and self._children_work():
            self._done += 1
            return True
        heard = list(self._heard)
        if doing.together and len(heard) == 2:
            first, last = heard
            behind = [r for r, said in last.items() if r != self.rank and said[0] <= self._mark]
            return any(last[r][:2] != first.get(r, [])[:2] for r in behind)
        return False

    def _worked_so_far(self) -> tuple[float, float, int, object]:
        """The time; seconds that the main thread has computed; bytes moved; where it stands."""
        cpu, moved = 0.0, 0
        with contextlib.suppress(AttributeError, OSError):
            cpu = time.clock_gettime(time.pthread_getcpuclockid(self._main))
            moved = _moved(Path("/proc/self/io"))
            if threading.get_ident() != self._main:  # this thread reads only to look
                moved -= _moved(Path(f"/proc/self/task/{threading.get_native_id()}/io"))
        frame = sys._current_frames().get(self._main)
        return self._clock(), cpu, moved, frame and (id(frame), frame.f_lasti)

    def _children_work(self) -> bool:
        """Whether programs that this one has started, such as compilers, have computed since."""
        before, self._children = self._children, 0.0
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                self._children += sum(child.cpu_times())
        return self._children != before

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

    def _end(self, doing: _Doing, code: int, silent: float) -> None:
        who = f"rank {self.rank} on {ranks.hostname()}"
        what, writing = doing.what, self.writing
        if doing.writes and writing.what:
            what = f"{writing.what} was awaited ({writing.file})"
        awaited = self._awaited()
        if code == PREEMPTED and ranks.being_closed():  # after another's failure
            os._exit(128 + self._signal)
        if code == PREEMPTED:  # whether to restart is for the launcher, which has the signal, too
            name = signal.Signals(self._signal).name
            lost = f"{writing.what} did not finish" if writing.what else "nothing was saved"
            good = "no checkpoint of this run is complete: the same command starts it again"
            if writing.good:
                good = f"the last good checkpoint is {writing.good}: start again to go on from it"
            self._print(
                f"error: {who}: told to stop by {name}, but nothing went on for {silent:.0f} s "
                f"while {what}{awaited}; {lost}; {good}"
            )
            os._exit(128 + self._signal if self._signal == signal.SIGINT else code)
        place = self._place()
        stacks = f"; the stacks are in {self._path}" if self._path else ""
        self._print(
            f"error: {who}: nothing went on for {doing.limit:g} s while {what}, at {place}"
            f"{awaited}{stacks}"
        )
        stacks = _stacks()
        _bounded(lambda: print(stacks, file=self._file if self._path else sys.stderr, flush=True))
        time.sleep(min(self.limit / 4, 5.0))  # or the others would see a lost peer, not a hang
        os._exit(code)

    def _place(self) -> str:
        frame = sys._current_frames()[self._main]
        stack = traceback.extract_stack(frame)
        ours = [entry for entry in stack if f"{os.sep}swin_moe{os.sep}" in entry.filename]
        place = (ours or stack)[-1]
        return f"{Path(place.filename).name}:{place.lineno} ({place.name})"

    def _awaited(self) -> str:
        """Names the ranks that are behind this one or have stopped; empty if none is known."""
        peers, heard = self._peers, list(self._heard)
        if peers is None:
            return ""
        found: list[str] = []

        def ask() -> None:
            late = self._late(heard)
            if late:
                found.append(peers.whose(late))

        if not _bounded(ask) or len(heard) < 2:
            return f"; what answers at {peers.place}, or the rank 0 behind it, has stopped"
        if not found:
            return ""
        return f"; awaited: {found[0]}; {ranks.world_variables()}"

    def _late(self, heard: list[dict[int, list[int]]]) -> list[int]:
        if len(heard) < 2:
            return []
        first, last = heard
        late = [r for r, (mark, _, pulse) in last.items() if mark < self._mark or
                (r in first and pulse == first[r][2])]  # fmt: skip
        return sorted(set(late) - {self.rank})


def _bounded(call: Callable[[], object]) -> bool:
    """Call what may hang, such as a write to a dead file system. Return whether it came back."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(3.0)
    return not thread.is_alive()


def _stacks() -> str:
    """Where all threads stand. faulthandler would hold up every thread while it writes."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread 0x{ident:x} ({names.get(ident, 'unknown')}):\n"
        + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )


def _moved(statistics: Path) -> int:
    """Bytes read and written, from a file of the kernel's statistics."""
    lines = statistics.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines[:2])  # rchar, wchar


_current: Watchdog | None = None


def start(limit: float, rank: int, signals: Iterable[int] = ()) -> Watchdog:
    """Watch this process from now on."""
    global _current
    _current = Watchdog(limit, rank)
    _current.start(signals)
    return _current


def going_on() -> None:
    """Report, from anywhere, that a wait with a limit of its own goes on."""
    if _current is not None and threading.get_ident() == _current._main:
        _current._go_on()
