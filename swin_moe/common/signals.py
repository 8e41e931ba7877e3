"""Signals that stop the program. Needs no torch.

Schedulers send SIGTERM or SIGUSR1 before they take a node away. A lost terminal sends SIGHUP. After
these, the exit code means "start again". SIGINT (Ctrl-C) has the exit code that shells give it.
Before the first update there is nothing to save, and the program ends at once. In training, the
signal is remembered and the ranks save together. A second Ctrl-C ends the program at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any, ClassVar

from . import ranks

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
PREEMPTED = 75  # the system's EX_TEMPFAIL: try again
INTERRUPTED = 128 + signal.SIGINT  # what shells give an interrupted program
TWICE = (
    "interrupted twice: ended at once, without saving; the same command goes on from the last "
    "checkpoint, if there is one"
)


def code_of(number: int) -> int:
    """Return the exit code after a signal."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def too_early(number: int) -> str:
    """Return the message for a signal before the first update."""
    cause = "interrupted" if number == signal.SIGINT else f"stopped by {_name(number)}"
    return f"{cause} before the first update: nothing is lost, the same command starts again"


def install(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Install ``handler`` for all signals not ignored (nohup), and return the former handlers."""
    former: dict[int, Any] = {number: signal.getsignal(number) for number in STOPS}
    former = {number: old for number, old in former.items() if old is not signal.SIG_IGN}
    for number in former:
        signal.signal(number, handler)
    return former


def watch() -> None:
    """From now on, end the program with one line on a signal."""
    if _Watch.process != os.getpid():  # the first call in this process, which may be forked
        _Watch.process, _Watch.former = os.getpid(), {}
    _Watch.former = _Watch.former or install(_note)


def release() -> None:
    """Restore the default handlers, for a program that does not train."""
    for number in _Watch.former:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
    _Watch.former = {}


class _Watch:
    """The state of signals in this process."""

    process = 0  # the one that installed the handlers, which forked ones inherit
    former: ClassVar[dict[int, Any]] = {}
    training: ClassVar[StopSignal | None] = None  # remembers a signal
    interrupts = 0


class StopSignal:
    """The order to stop, which a training polls inside this ``with``.

    Until :meth:`defer` is called, a signal ends the process at once.

    Attributes:
        came: whether this process has received a signal.
        name: the first signal's name, empty without one.
    """

    came = False

    def __init__(self) -> None:
        self.name = ""

    def __call__(self) -> int:
        """Return 0 without a signal, 1 after SIGINT, 2 after others; ranks take their maximum."""
        return bool(self.name) + (self.name not in ("", "SIGINT"))

    def __enter__(self) -> StopSignal:
        self._own = not _Watch.former
        watch()
        return self

    def defer(self) -> None:
        """From now on, remember a signal until the training polls it."""
        _Watch.training = self

    def __exit__(self, *_: object) -> None:
        if self._own:  # otherwise the program ends now, and its handlers stay
            _Watch.training = None
            for number, handler in _Watch.former.items():
                signal.signal(number, handler)
            _Watch.former = {}


def _note(number: int, _frame: Any) -> None:
    if os.getpid() != _Watch.process:  # a process forked later: default behaviour
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    StopSignal.came = True
    training = _Watch.training
    if ranks.being_closed():  # another process has failed, and this one will notice
        if training is None:
            os._exit(128 + number)
        return
    _Watch.interrupts += number == signal.SIGINT
    if training is None:
        _end(too_early(number), code_of(number))
    elif _Watch.interrupts > 1:
        _end(TWICE, INTERRUPTED)
    elif not training.name:
        training.name = _name(number)
        if number == signal.SIGINT and os.isatty(2):
            _say("interrupted: saving after this update; once more ends at once")


def _end(message: str, code: int) -> None:
    """End this process at once; only the first rank of each node prints."""
    ranks.refuse_restart()
    _say(f"error: {message}")
    os._exit(code)


def _say(message: str) -> None:
    if ranks.is_first_of_node():
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, f"swin-moe: {message}\n".encode())  # print may have been interrupted


def _name(number: int) -> str:
    return signal.Signals(number).name
