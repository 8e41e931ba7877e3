"""The results of trials that a machine keeps: one JSON file per library, device and torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO

import torch

from ...common.cache_folder import cache_folder
from ...common.text import reason
from ...common.writing import replacing
from .. import _library
from ..signature import Choice, Signature

log = logging.getLogger("swin_moe")

FOLDER = "kernels"
VERSION = 1  # of the checks; a higher one makes every machine try again
PATIENCE_S = 300.0  # to wait for the trials of another process
MOST = 1 << 22  # bytes of a file that are read


@cache
def machine(kind: str) -> dict[str, str]:
    """Return what the results for a kind of device depend on."""
    facts = {
        "checks": str(VERSION),
        "library": _library.library_digest(),
        "torch": torch.__version__,
        "device": kind,
    }
    if kind == "cuda":
        index = torch.cuda.current_device()
        facts["name"] = torch.cuda.get_device_name(index)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(index)))
        facts["driver"] = _driver()
    else:
        facts["name"] = _processor()
        sets = (_library.cpu_instruction_set(d) for d in _library.KERNEL_DTYPES["cpu"])
        facts["instructions"] = " ".join(map(str, sets))
        facts["threads"] = str(torch.get_num_threads())
    return facts


class Kept:
    """The results for a kind of device of this machine.

    Attributes:
        path: their file; None if there is no folder to write in, and then nothing is kept.
    """

    def __init__(self, kind: str) -> None:
        self.facts = machine(kind)
        folder = cache_folder(FOLDER)
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"{digest}.json"

    def read(self) -> dict[Signature, Choice]:
        """Return the results; none if the file is missing, damaged or another machine's."""
        if self.path is None:
            return {}
        try:
            with self.path.open("rb") as file:
                content = json.loads(file.read(MOST))
            if content["machine"] != self.facts:
                return {}
            return {
                Signature(op, device, dtype, tuple(shape)): Choice(
                    right is True, str(why), float(speedup)
                )
                for (op, device, dtype, shape), (right, why, speedup) in content["choices"]
            }
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return {}

    def write(self, choices: dict[Signature, Choice]) -> None:
        """Keep the results that later runs may use."""
        if self.path is None:
            return
        lasting = [[list(key), list(c[:3])] for key, c in choices.items() if c.lasting]
        text = json.dumps({"machine": self.facts, "choices": lasting}, indent=1)
        try:
            with replacing(self.path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            log.warning("the kernels' trials are not kept: %s", reason(error))

    @contextlib.contextmanager
    def lock(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the right to make trials; without a folder each process makes its own.

        Args:
            say: reports that another process holds it. After ``PATIENCE_S`` this one goes on.
        """
        with contextlib.ExitStack() as stack:
            if self.path is not None:
                with contextlib.suppress(OSError):  # some network disks have no locks
                    file = stack.enter_context(self.path.with_suffix(".lock").open("w"))
                    _wait(file, say)
            yield


def _wait(file: IO[str], say: Callable[[str], None]) -> None:
    """Lock a file, or give up after a while."""
    began, said = time.monotonic(), False
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        waited = time.monotonic() - began
        if waited > PATIENCE_S:
            say(f"another process has tried kernels for {PATIENCE_S:g} s; not waiting any longer")
            return
        if waited > 2.0 and not said:
            said = True
            say(f"waiting for another process that tries kernels ({file.name})")
        time.sleep(0.05)


def forget() -> Path | None:
    """Delete the results of all machines that share the folder; return it."""
    folder = cache_folder(FOLDER)
    for path in folder.glob("*.json") if folder else ():  # not the locks, which others may hold
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("not cleared: %s", reason(error))
    return folder


def _processor() -> str:
    """Return the name of the processor; Python knows only its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return "unknown"
