"""Runs a command, and turns an error into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import re
import sys
import time
import traceback
import warnings
from typing import cast

from ..common import ranks, signals
from ..common.errors import Preempted, RunRemoved, TrainingError
from ..common.host import use_expandable_segments
from ..common.signals import INTERRUPTED, PREEMPTED
from ..common.text import plain, plain_lines, reason
from ..common.writing import LogFile, PlainFormatter
from .parser import parse
from .shared import FAILED, WRONG_USE
from .system_errors import explain

# The module of each command; it has a function ``COMMAND_command(arguments, console)``.
_MODULES = {
    "train": "runs",
    "doctor": "runs",
    "evaluate": "runs",
    "inspect": "runs",
    "plan": "runs",
    "launch": "runs",
    "models": "models",
    "recipes": "recipes",
    "convert": "models",
    "checkpoint": "checkpoints",
    "prepare-data": "data",
    "data": "data",
}
_PATIENCE = 5.0  # seconds that the launcher may take to end the other processes of a node
# Parts of the errors of gloo, NCCL and the store when the other end is gone.
_LOST_PEER = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")


def main(argv: list[str] | None = None) -> int:
    """Run the command of ``argv`` and return the exit code."""
    arguments = parse(argv)
    use_expandable_segments()
    if arguments.command not in ("train", "launch"):  # the others die by signals as usual
        signals.release()
    quiet_libraries()
    try:
        os.getcwd()  # without it torch's libraries abort
        rank, local_rank, size = ranks.environment_rank()
    except FileNotFoundError:
        gone = "the folder in which this was started has been removed: cd to another one"
        return _fail(gone, True, WRONG_USE)
    except ValueError as error:
        return _fail(reason(error), True, WRONG_USE)
    where = f"[rank {rank}] " if local_rank else ""
    try:
        code = _run(arguments)
        if distributed := sys.modules.get("swin_moe.distributed.world"):
            distributed.shutdown()
        return code
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" * (arguments.command == "prepare-data")
        return _fail(f"interrupted{goes_on}", local_rank == 0, INTERRUPTED)
    except (ValueError, OSError) as error:
        # Every rank of a node has the same error: one of them prints it.
        _show_traceback(arguments)
        if isinstance(error, ValueError):
            ranks.refuse_restart()
        text = explain(error, arguments) if isinstance(error, OSError) else reason(error)
        return _fail(f"{where}{text}", local_rank == 0, WRONG_USE)
    except Exception as error:
        if isinstance(error, (Preempted, TrainingError, RunRemoved)):
            ranks.refuse_restart()
        if isinstance(error, Preempted):
            code = INTERRUPTED if error.interrupted else PREEMPTED
            return _fail(reason(error), local_rank == 0, code, alone=False)
        _show_traceback(arguments)
        if isinstance(error, RunRemoved):  # one rank may notice it first
            return _fail(f"{where}{reason(error)}", local_rank == 0)
        if isinstance(error, TrainingError):  # raised on every rank, or on none
            return _fail(reason(error), local_rank == 0, alone=False)
        where = f"[rank {rank}] " if size > 1 else ""
        loader = sys.modules.get("swin_moe.data.loader")
        if loader and (died := loader.why_died(error)):
            return _fail(f"{where}{died}", True)
        if size > 1 and any(sign in str(error) for sign in _LOST_PEER):
            return _fail(f"{where}another process ended, and this one with it", False)
        return _fail(f"{where}{_unexpected(error, arguments)}", True)


def _show_traceback(arguments: argparse.Namespace) -> None:
    """Write the traceback to the run's log, if there is one, and to the console with --debug."""
    logging.getLogger("swin_moe").debug("failed", exc_info=True)
    if arguments.debug:
        traceback.print_exc()


def _unexpected(error: Exception, arguments: argparse.Namespace) -> str:
    """Return the message of an unforeseen error, and where its traceback is."""
    kind, text = type(error).__name__, reason(error)
    if kind == "OutOfMemoryError":  # torch's, for a GPU
        return (
            f"{text.removesuffix('.')}: lower data.batch_size, or see what fits by "
            "`swin-moe plan CONFIG`"
        )
    if op := re.match(r"(\S+) does not have a deterministic implementation", text):
        return f"train.deterministic=true: {op[1]} has no deterministic form here; set it to false"
    if text != kind:
        text = f"{kind}: {text}"
    if arguments.debug:
        return text
    log_file = LogFile.current()
    where = f"the traceback is in {plain(log_file)}" if log_file else "--debug shows the traceback"
    return f"{text} ({where})"


def _fail(message: str, first: bool, code: int = FAILED, alone: bool = True) -> int:
    """Print an error in one line and return the exit code.

    Args:
        first: print at once. Other ranks wait for their end, as the first rank prints the error.
        alone: this rank may be the only one that fails; it prints if it is not ended.
    """
    logging.getLogger("swin_moe").debug("error: %s", message)
    if not first:
        # The first exit ends all processes of the node. One that lives on has failed alone.
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if signals.StopSignal.came:  # from the launcher
                return code
            time.sleep(0.05)
    if first or alone:
        with contextlib.suppress(OSError):  # a full disk must not change the exit code
            print(f"swin-moe: error: {plain_lines(message)}", file=sys.stderr, flush=True)
    return code


def _run(arguments: argparse.Namespace) -> int:
    from ..common.terminal import Terminal

    command = arguments.command
    module = importlib.import_module(f".{_MODULES[command]}", __package__)
    run = getattr(module, f"{command.replace('-', '_')}_command")
    return cast(int, run(arguments, Terminal()))


def quiet_libraries() -> None:
    """Send the libraries' messages to the logs; only warnings and errors reach the console."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that it cannot encode are escaped
            stream.reconfigure(errors="backslashreplace")
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    # timm warns about settings that the config has checked, such as a cosine of one update.
    console.addFilter(lambda record: not record.name.startswith("timm."))
    logging.getLogger().addHandler(console)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def entry() -> None:
    """Run the program and end the process."""
    signals.watch()
    code = main()
    ranks.leave(code)


if __name__ == "__main__":
    entry()
