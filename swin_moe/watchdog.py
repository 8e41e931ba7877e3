"""Finds a rank that hangs: where every rank stands goes to its log, and the process ends.

A hanging rank makes all others wait for it, so that all of them find out at about the same time,
each for itself; the launcher then restarts the group. The stack of the one that hangs is the one
that is not in a reduction.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

HUNG = 1  # exit code; a launcher restarts after it
_GRACE = 10.0  # seconds until the process is ended where not even Python's threads run


class Watchdog:
    """Ends the process when :meth:`beat` was not called for too long.

    A thread of Python tells where the program stands; should that thread not run either, because a
    library holds the interpreter, the C library's timer does the same a little later.

    Args:
        limit: seconds without a beat; 0 = never. log: the file that gets the stacks.
    """

    def __init__(self, limit: float, log: Path, rank: int) -> None:
        self.limit, self.path, self.rank = limit, log, rank
        self._file = log.open("a", encoding="utf-8")
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._last: float | None = None  # None: not watched now
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit:
            self._thread.start()

    def beat(self) -> None:
        """Say that the program goes on; the first one begins the watch."""
        if self.limit:
            self._last = time.monotonic()
            faulthandler.dump_traceback_later(self.limit + _GRACE, exit=True, file=self._file)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not to watch meanwhile: for waits that have no limit of their own."""
        self._last = None
        faulthandler.cancel_dump_traceback_later()
        yield
        self.beat()

    def stop(self) -> None:
        self._ended.set()
        self._last = None
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def _watch(self) -> None:
        while not self._ended.wait(min(self.limit / 10, 1.0)):
            last = self._last
            if last is not None and time.monotonic() - last > self.limit:
                self._end()

    def _end(self) -> None:
        frame = sys._current_frames()[self._main]
        stack = traceback.extract_stack(frame)
        ours = [entry for entry in stack if f"{os.sep}swin_moe{os.sep}" in entry.filename]
        place = (ours or stack)[-1]
        where = f"{Path(place.filename).name}:{place.lineno} ({place.name})"
        print(
            f"swin-moe: error: rank {self.rank}: nothing went on for {self.limit:g} s at {where}; "
            f"the stacks are in {self.path}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(self._file, all_threads=True)
        time.sleep(min(self.limit / 4, 5.0))  # or the others would see a lost peer, not a hang
        os._exit(HUNG)
