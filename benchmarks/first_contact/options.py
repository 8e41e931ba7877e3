"""The options of every step, and its output."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from benchmarks.first_contact import record


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--device``, ``--json`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--quick", action="store_true", help="toy sizes, for a rehearsal")
    return parser


def write(options: argparse.Namespace, **found: object) -> None:
    """Write the results of a step, if a path was given."""
    if options.json is not None:
        record.write(options.json, found)


def not_run(why: str) -> NoReturn:
    """End a step that cannot run here."""
    print(why, flush=True)
    raise SystemExit(record.NOT_RUN)


def environment() -> dict[str, str]:
    """Return an environment for a child process: without ranks, and with unbuffered output."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return env | {"PYTHONUNBUFFERED": "1"}
