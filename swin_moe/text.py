"""Names from people's disks as text that can be printed, drawn and written anywhere."""

from __future__ import annotations

import os


def plain(name: str | os.PathLike[str]) -> str:
    r"""A name as one line of valid UTF-8.

    A byte of a file's name that is not UTF-8 is shown as ``\xe9``, a control character (such as a
    line break or an escape sequence of a terminal) as ``\x1b``; all else stays as it is.
    """
    text = os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in "\u3000\u00a0\u200d" else repr(one)[1:-1] for one in text
    )
