"""Output to files and to the console that goes on after errors of a disk, a pipe or a terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .text import plain, plain_lines, reason

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger("swin_moe")

KEPT = 16 << 20  # bytes per file that wait in memory until the disk works again


class Outage:
    """A state that is logged once when writing begins to fail and once when it works again."""

    def __init__(self, name: str) -> None:
        self.name, self.lasts = name, False

    def began(self, error: OSError, meanwhile: str) -> None:
        if not self.lasts:
            self.lasts = True  # before the warning, which may go to the failing file itself
            why = error.strerror or reason(error)
            log.warning("%s cannot be written (%s); %s", self.name, why, meanwhile)

    def ended(self, left: str) -> None:
        if self.lasts:
            self.lasts = False
            log.warning("%s is written again, %s", self.name, left)


@contextlib.contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to, and rename it to ``path`` after success.

    Args:
        folder: of the temporary file, on the same file system; None = that of ``path``.
    """
    temporary = (folder or path.parent) / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def open_to_append(path: Path) -> IO[bytes]:
    """Open a file, without a buffer, to append to it.

    Raises:
        OSError: as usual, and for a pipe without a reader, which would block.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "ab", buffering=0)


class Appender:
    """A file to append to; data that cannot be written waits in memory and is written later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = bytearray()
        self._lost = 0  # bytes
        self._outage = Outage(plain(path))

    def __str__(self) -> str:
        return plain(self.path)

    def write(self, data: bytes) -> None:
        """Append ``data`` whole; drop it if more than ``KEPT`` bytes wait already."""
        self._waiting += data
        try:
            # Opened each time: if the file is removed or moved, a new one takes its place.
            with open_to_append(self.path) as file:
                while self._waiting:
                    del self._waiting[: file.write(self._waiting)]
        except OSError as error:
            if len(self._waiting) > max(KEPT, len(data)):
                del self._waiting[len(self._waiting) - len(data) :]
                self._lost += len(data)
            self._outage.began(
                error, f"training goes on, and up to {KEPT >> 20} MB of it are kept in memory"
            )
        else:
            left = f"without {self._lost:,} bytes for which there was no room in memory"
            self._outage.ended(left if self._lost else "and nothing of it is lost")
            self._lost = 0

    def close(self) -> None:
        """Try once more, and log how many bytes are missing at the end."""
        self.write(b"")
        if lost := len(self._waiting) + self._lost:
            self._waiting.clear()
            self._lost = 0
            log.warning("%s lacks its last %s bytes", plain(self.path), f"{lost:,}")


class PlainFormatter(logging.Formatter):
    """A formatter of log lines in valid UTF-8 without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_lines(super().format(record))


class LogFile(logging.Handler):
    """A handler that writes log records to a file, see :class:`Appender`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file = Appender(path)

    @staticmethod
    def current() -> Path | None:
        """Return the path that this process logs to, None without one."""
        handlers = logging.getLogger().handlers
        return next((h.path for h in handlers if isinstance(h, LogFile)), None)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # arguments that do not fit the message
            self.handleError(record)
        else:
            self._file.write(f"{line}\n".encode())

    def close(self) -> None:
        self._file.close()
        super().close()


class _Outlet(io.FileIO):
    """A file descriptor that drops data it cannot write, and warns once."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number, "w", closefd=False)
        self._outage = Outage(name)

    def write(self, data: ReadableBuffer, /) -> int:
        left = memoryview(data).cast("B")
        size = left.nbytes
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self._outage.began(error, "this program goes on")
        else:
            self._outage.ended("what was printed meanwhile is lost")
        return size


def open_streams() -> None:
    """Open standard streams that the caller has closed on ``/dev/null``.

    Otherwise the next file that is opened would take a standard stream's number.
    """
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
        os.set_inheritable(number, number <= 2)
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


@contextlib.contextmanager
def unbreakable_streams() -> Iterator[None]:
    """Let printing survive a full disk, a closed pipe and a lost terminal."""
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    for name, stream in streams.items():
        with contextlib.suppress(OSError, AttributeError):  # a stream of a test, or None
            # The outlet's warning may be written to itself, in the middle of a write: a buffered
            # writer would raise then. The text's own buffer keeps lines whole.
            outlet: Any = _Outlet(stream.fileno(), f"the program's {name}")
            text = io.TextIOWrapper(
                outlet, stream.encoding, "backslashreplace", line_buffering=True
            )
            setattr(sys, name, text)
    try:
        yield
    finally:
        for name, stream in streams.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
