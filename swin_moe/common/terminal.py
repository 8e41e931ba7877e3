"""The console of every command: names are printed as they are, whatever is in them."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console, RenderableType
from rich.status import Status
from rich.text import Text

from .text import plain, plain_lines

WIDE = 400  # columns of a pipe or file, which has no width of its own: nothing is folded there


class Terminal(Console):
    """A rich console without markup and emoji codes; what cannot be printed is shown escaped."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = WIDE

    @property
    def live(self) -> bool:
        """Whether a person watches: then a line may be drawn over another."""
        return self.file.isatty() and not self.is_dumb_terminal

    def render_str(self, text: str, **options: Any) -> Text:
        """All strings come through here: those of tables, their titles and captions, too."""
        return super().render_str(plain_lines(text), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner, for which rich would read markup whatever the console says."""
        return super().status(
            self.render_str(status) if isinstance(status, str) else status, **options
        )


def cell(name: str | os.PathLike[str]) -> Text:
    """A name as one line of a table, on any console of rich."""
    return Text(plain(name))
