"""Names from people's disks as text that can be printed, drawn and written anywhere."""

from __future__ import annotations

import os

SHORT = 200  # characters
JOINERS = "\u3000\u00a0\u200d"  # ideographic, no-break and emoji-joining spaces: harmless in a line


def plain(name: str | os.PathLike[str]) -> str:
    r"""Return a name as one line of valid UTF-8.

    A byte of a file's name that is not UTF-8 is shown as ``\xe9``, a control character (such as a
    line break or a terminal's escape sequence) as ``\x1b``; the rest stays unchanged.
    """
    return _printable(os.fspath(name), JOINERS)


def plain_lines(text: str) -> str:
    """Return a text as :func:`plain` does, but keep its line breaks and tabs."""
    return _printable(text, JOINERS + "\n\t")


def _printable(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else _escape(c) for c in text)


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # Python's stand-in for a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return repr(character)[1:-1]


def shorten(name: str) -> str:
    """Return a name as :func:`plain` does, cut to fit below a small picture."""
    text = plain(name)
    return text if len(text) <= 18 else f"{text[:17]}…"


def reason(error: BaseException) -> str:
    """Return an error's text in one line that is never empty.

    A short text stays whole, since its line breaks may belong to a name. If a worker process raised
    the error, torch passes its traceback as the text, and only the last line is returned.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        file = f"{plain(os.fsdecode(error.filename))}: " if error.filename else ""
        text = f"{file}{error.strerror}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    relayed = any(line.startswith("Original Traceback") for line in lines[:2])
    if relayed:
        return plain(lines[-1])
    return plain(text.strip() if len(text) <= SHORT else lines[0])
