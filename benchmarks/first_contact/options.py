"""The options that every step takes, and how it writes what it found."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from benchmarks.first_contact import record


def arguments(description: str | None) -> argparse.ArgumentParser:
    """``--device``, ``--json``, ``--quick``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--quick", action="store_true", help="toy sizes, for a rehearsal")
    return parser


def write(options: argparse.Namespace, **found: object) -> None:
    """Write what a step found, if a path was given."""
    if options.json is not None:
        record.write(options.json, found)


def not_run(why: str) -> NoReturn:
    """End a step that lacks something here."""
    print(why, flush=True)
    raise SystemExit(record.NOT_RUN)


def environment() -> dict[str, str]:
    """This process's environment, for one that it starts: no ranks, and Python says all at once."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return env | {"PYTHONUNBUFFERED": "1"}
