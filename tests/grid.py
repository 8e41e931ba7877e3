"""Grids of cases: a few always, a daily sample of the others, all of them in ``test-all``."""

from __future__ import annotations

import datetime
import os
import random
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

LONG = pytest.mark.long
DAY = "SWIN_MOE_TESTS_DAY"  # environment variable: the day of the sample


def choose_day() -> None:
    """Set the day for all processes of the session: midnight may come between their starts."""
    os.environ.setdefault(DAY, datetime.datetime.now(datetime.timezone.utc).date().isoformat())


def day() -> str:
    choose_day()
    return os.environ[DAY]


def sampled(name: str, cases: Iterable[Any], count: int, always: Sequence[Any] = ()) -> list[Any]:
    """Return parameters for ``pytest.mark.parametrize``; those not in the sample are ``long``.

    Args:
        name: of the grid; each has its own sample.
        count: cases of the sample, in addition to ``always``.
    """
    cases = list(cases)
    others = [case for case in cases if case not in always]
    generator = random.Random(zlib.crc32(f"{name} {day()}".encode()))
    chosen = [*always, *generator.sample(others, min(count, len(others)))]
    return [case if case in chosen else pytest.param(case, marks=LONG) for case in cases]
