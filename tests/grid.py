"""Grids of cases: a few always, a sample that changes with the day, all of them in ``test-all``."""

from __future__ import annotations

import datetime
import os
import random
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

LONG = pytest.mark.long
DAY = "SWIN_MOE_TESTS_DAY"  # environment variable: the day whose sample is taken


def choose_day() -> None:
    """Settle the day for all processes of the session: midnight may come between them."""
    os.environ.setdefault(DAY, datetime.datetime.now(datetime.timezone.utc).date().isoformat())


def day() -> str:
    choose_day()
    return os.environ[DAY]


def sampled(name: str, cases: Iterable[Any], count: int, always: Sequence[Any] = ()) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``; those that are not taken today are ``long``.

    Args:
        name: of the grid, so that each has a sample of its own.
        count: cases that are taken in addition to ``always``.
    """
    cases = list(cases)
    others = [case for case in cases if case not in always]
    generator = random.Random(zlib.crc32(f"{name} {day()}".encode()))
    chosen = [*always, *generator.sample(others, min(count, len(others)))]
    return [case if case in chosen else pytest.param(case, marks=LONG) for case in cases]
