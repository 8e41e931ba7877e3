"""Work on many items in forked processes, which see what the parent had in memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``work(item)`` of all items, as they are done; to be closed if it is left early.

    The processes inherit tables and files by forking: nothing is copied until it is changed.
    """
    context = multiprocessing.get_context("fork")
    gc.collect()
    gc.freeze()  # or a collection in a process would touch, and so copy, all that it inherits
    count = max(1, min(workers, len(items)))
    pool = ProcessPoolExecutor(count, context, initializer=_leave_with_the_parent)
    try:
        futures = [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _leave_with_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
