"""Trials of the compiled kernels on this machine, before anything depends on them.

``child.py`` is a process that checks kernels and times them, because a kernel that crashes or hangs
must cost only that process. ``cases.py`` has the calls of each op, ``checks.py`` what a kernel must
pass. This file starts the child and keeps the results in ``kept.py``'s file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import torch

from ...common.text import plain
from ..signature import Choice, Signature
from .kept import Kept

log = logging.getLogger("swin_moe")

# The child; it gets the file descriptor for its answers, the GPU, and the number of threads.
PROGRAM = (sys.executable, "-m", "swin_moe.ops.trial.child")
LIMIT_S = {"cpu": 60.0, "cuda": 240.0}  # for one trial; on CUDA it compiles the fallback
START_S = 120.0  # to import torch on a busy machine or a slow disk


def try_kernels(
    signatures: Sequence[Signature], say: Callable[[str], None] = log.info
) -> dict[Signature, Choice]:
    """Return a choice for each signature: a kept one, or that of a trial.

    Of the processes of a machine, one makes the trials while the others wait for its results.

    Args:
        say: reports that trials begin and end, which takes seconds.
    """
    found: dict[Signature, Choice] = {}
    for kind in dict.fromkeys(s.device for s in signatures):
        mine = [s for s in signatures if s.device == kind]
        kept = Kept(kind)
        known = kept.read()
        if not known.keys() >= set(mine):
            with kept.lock(say):
                known = kept.read()
                missing = [s for s in mine if s not in known]
                if missing:
                    known |= _try(missing, LIMIT_S[kind], say)
                    kept.write(known)
        found |= {s: known[s] for s in mine}
    return found


def _try(
    signatures: list[Signature], limit: float, say: Callable[[str], None]
) -> dict[Signature, Choice]:
    """Try all signatures, with another child after each that dies."""
    count = f"{len(signatures)} kernel" + "s" * (len(signatures) > 1)
    say(f"trying {count} on this machine, once")
    began = time.monotonic()
    found: dict[Signature, Choice] = {}
    while len(found) < len(signatures):
        rest = [s for s in signatures if s not in found]
        found |= _one_child(rest, limit)
    say(f"tried {count} in {time.monotonic() - began:.0f} s")
    return found


def _one_child(signatures: list[Signature], limit: float) -> dict[Signature, Choice]:
    """Return the choices that one child makes, at least one of them.

    The child writes a JSON object a line: its number when a trial begins, then the result.
    """
    gpu = torch.cuda.current_device() if signatures[0].device == "cuda" else 0
    answers, end = os.pipe()
    with tempfile.TemporaryFile() as errors, os.fdopen(answers, "rb", 0) as reader:
        child = subprocess.Popen(
            [*PROGRAM, str(end), str(gpu), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(end,),
            start_new_session=True,
        )
        os.close(end)
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; its end shows below
                _give(child, signatures)
            heard = _listen(reader, signatures, limit)
        finally:
            _end(child)
        if heard.tried is not None:  # a kernel's fault: the next child goes on after it
            ended = f"did not end within {limit:g} s" if heard.late else _how_ended(child)
            # A CPU may have been busy; SIGKILL and SIGTERM come from outside.
            outside = child.returncode in (-signal.SIGKILL, -signal.SIGTERM) and not heard.late
            lasting = not outside and not (heard.late and heard.tried.device == "cpu")
            refused = Choice(False, f"the kernel's trial {ended}", lasting=lasting)
            return {**heard.found, heard.tried: refused}
        if heard.found:
            return heard.found
        errors.seek(0)
        lines = errors.read()[-4000:].decode(errors="replace").strip().splitlines()
    ended = f"did not start within {START_S:g} s" if heard.late else _how_ended(child)
    why = f" ({plain(lines[-1][:200])})" if lines else ""
    untried = Choice(False, f"it could not be tried: the process {ended}{why}", lasting=False)
    return dict.fromkeys(signatures, untried)


class _Heard(NamedTuple):
    """What a child has reported.

    Attributes:
        tried: the signature whose trial has begun and not ended.
        late: the time was up.
    """

    found: dict[Signature, Choice]
    tried: Signature | None = None
    late: bool = False


def _listen(reader: IO[bytes], signatures: list[Signature], limit: float) -> _Heard:
    """Read a child's reports until it has tried all, ends, or is late."""
    found: dict[Signature, Choice] = {}
    tried: Signature | None = None
    text = b""
    deadline = time.monotonic() + START_S
    waiting = select.poll()  # `select` takes no large descriptors
    waiting.register(reader, select.POLLIN)
    while len(found) < len(signatures):
        left = deadline - time.monotonic()
        if left <= 0 or not waiting.poll(1000 * left):
            return _Heard(found, tried, late=True)
        part = reader.read(1 << 16)
        if not part:
            return _Heard(found, tried)
        *lines, text = (text + part).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            tried, deadline = signatures[message["signature"]], time.monotonic() + limit
            if "choice" in message:
                found[tried], tried = Choice(*message["choice"]), None
    return _Heard(found)


def _give(child: subprocess.Popen[bytes], signatures: list[Signature]) -> None:
    assert child.stdin is not None
    with child.stdin:
        child.stdin.write(json.dumps(signatures).encode())


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and all that it has started; one that has reported all may end by itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _how_ended(child: subprocess.Popen[bytes]) -> str:
    code = child.returncode
    if code >= 0:
        return f"ended with {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
