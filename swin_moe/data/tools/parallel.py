"""Work on many items in forked processes, which inherit the parent's memory."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from ...common.fork_server import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``work(item)`` of all items in the order of completion; close it if you leave early.

    The processes inherit tables and files by forking: nothing is copied until it is changed.
    """
    context = multiprocessing.get_context("fork")
    gc.collect()
    gc.freeze()  # otherwise a collection in a process would write to inherited pages, and copy them
    count = max(1, min(workers, len(items)))
    pool = ProcessPoolExecutor(count, context, initializer=_prepare_process)
    try:
        futures = [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
    die_with_parent()
