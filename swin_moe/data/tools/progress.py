"""A progress bar over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ...common.text import plain


@contextmanager
def sample_progress(
    console: Console, name: str, total: int
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of samples done and bytes moved; draw nothing if piped to a file."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(plain(name), total=total, speed="")
        moved = 0

        def advance(samples: int, size: int) -> None:
            nonlocal moved
            moved += size
            seconds = bar.tasks[task].elapsed or 0.0
            speed = f"{moved / 1e6 / seconds:,.0f} MB/s" if moved and seconds else ""
            bar.update(task, advance=samples, speed=speed)

        yield advance
