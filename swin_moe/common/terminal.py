"""The console of every command: names are printed without markup, and escaped where needed."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console, RenderableType
from rich.status import Status
from rich.text import Text

from .text import plain, plain_lines

WIDE = 400  # columns of a pipe or a file: wide enough that no line is folded


class Terminal(Console):
    """A rich console without markup and emoji codes; unprintable characters are shown escaped."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = WIDE

    @property
    def live(self) -> bool:
        """Whether the output is a terminal, where a line may be drawn over another."""
        return self.file.isatty() and not self.is_dumb_terminal

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape a string; rich passes all of them here, a table's title and caption included."""
        return super().render_str(plain_lines(text), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show a spinner; rich itself would read markup in its text."""
        return super().status(
            self.render_str(status) if isinstance(status, str) else status, **options
        )


def print_line(console: Console, text: str) -> None:
    """Print a line on any console of rich, without markup, colours and folding."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def cell(name: str | os.PathLike[str]) -> Text:
    """Return a name as one line of a table, for any console of rich."""
    return Text(plain(name))
