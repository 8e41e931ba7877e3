"""Samples that cannot be read: each is listed, and they are counted by kind."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import NamedTuple

from ..common.text import plain
from ..common.writing import Appender

log = logging.getLogger(__name__)

TOLD = 10  # one by one; of further ones the list knows
ALLOWED_BAD = 10  # images of an epoch, however few it has


def allowed_bad(samples: int, share: float) -> float:
    """How many images of an epoch may be unreadable, see ``data.max_bad_share``."""
    return max(share * samples, ALLOWED_BAD)


class Skipped(NamedTuple):
    """A sample that could not be read: its key, the kind of error and what it said."""

    key: str
    kind: str
    reason: str


class BadSamples:
    """What one rank could not read of a split.

    Attributes:
        kinds: how many of each kind.
        file: a list of them, a JSON object a line; None = only told.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self.kinds: Counter[str] = Counter()
        self.file: Appender | None = None

    @property
    def total(self) -> int:
        return self.kinds.total()

    def add(self, skipped: list[Skipped]) -> None:
        """Count, report and list them, each once however often it comes."""
        new = {sample.key: sample for sample in skipped if sample.key not in self._known}
        self._known.update(new)
        skipped = list(new.values())
        for sample in skipped:
            self.kinds[sample.kind] += 1
            level = logging.WARNING if self.total <= TOLD else logging.DEBUG
            told = plain(sample.key), plain(sample.reason)
            log.log(level, "skipped unreadable image %s (%s)", *told)
        if self.total >= TOLD > self.total - len(skipped):
            log.warning("further unreadable images are listed in %s", self.file or "the log")
        if self.file is not None and skipped:
            lines = "".join(json.dumps(sample._asdict()) + "\n" for sample in skipped)
            self.file.write(lines.encode())
