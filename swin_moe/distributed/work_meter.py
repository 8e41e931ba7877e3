"""Measures the work of this process and of its children, by which the watchdog sees progress."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil


class Work(NamedTuple):
    """The work of this process so far.

    Attributes:
        cpu: seconds that the main thread has computed.
        moved: bytes that the process has read and written, without those of the measuring thread.
        place: the bytecode instruction at which the main thread stands.
    """

    cpu: float
    moved: int
    place: object


class WorkMeter:
    """A meter of work; the thread that makes it is the main thread."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._children = 0.0

    def measure(self) -> Work:
        """Return the work so far; 0 where the system does not count it."""
        cpu, moved = 0.0, 0
        with contextlib.suppress(AttributeError, OSError):
            cpu = time.clock_gettime(time.pthread_getcpuclockid(self._main))
            moved = _moved(Path("/proc/self/io"))
            if threading.get_ident() != self._main:  # this thread reads only to measure
                moved -= _moved(Path(f"/proc/self/task/{threading.get_native_id()}/io"))
        frame = sys._current_frames().get(self._main)
        return Work(cpu, moved, frame and (id(frame), frame.f_lasti))

    def children_computed(self) -> bool:
        """Return whether child processes, such as compilers, have computed since the last call."""
        before, self._children = self._children, 0.0
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                self._children += sum(child.cpu_times())
        return self._children != before


def _moved(statistics: Path) -> int:
    """Return the bytes read and written that a statistics file of the kernel counts."""
    lines = statistics.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines[:2])  # rchar, wchar
