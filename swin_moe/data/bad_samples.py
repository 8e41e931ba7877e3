"""Lists and counts of samples that cannot be read."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ..common.text import plain
from ..common.writing import Appender
from .decode import UnreadableImage

log = logging.getLogger(__name__)

LOGGED = 10  # samples that are logged one by one; further ones are only listed
ALLOWED_BAD = 10  # images of an epoch, at least


def allowed_bad(samples: int, share: float) -> float:
    """Return how many images of an epoch may be unreadable, see ``data.max_bad_share``."""
    return max(share * samples, ALLOWED_BAD)


class Skipped(NamedTuple):
    """A sample that could not be read: its key, and the kind and text of the error."""

    key: str
    kind: str
    reason: str

    @classmethod
    def of(cls, key: str, error: OSError | ValueError) -> Skipped:
        kind = error.kind if isinstance(error, UnreadableImage) else "cannot be read"
        return cls(key, kind, (str(error).splitlines() or [""])[0])


def json_lines(skipped: Iterable[Skipped]) -> str:
    """Return one JSON object per line."""
    return "".join(json.dumps(sample._asdict()) + "\n" for sample in skipped)


class BadSamples:
    """The samples of a split that one rank could not read.

    Attributes:
        kinds: their number by kind of error.
        file: lists them, one JSON object per line; None = they are only logged.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self.kinds: Counter[str] = Counter()
        self.file: Appender | None = None

    @property
    def total(self) -> int:
        return self.kinds.total()

    def add(self, skipped: list[Skipped]) -> None:
        """Count, log and list samples, each only once."""
        new = {sample.key: sample for sample in skipped if sample.key not in self._known}
        self._known.update(new)
        skipped = list(new.values())
        for sample in skipped:
            self.kinds[sample.kind] += 1
            level = logging.WARNING if self.total <= LOGGED else logging.DEBUG
            key, reason = plain(sample.key), plain(sample.reason)
            log.log(level, "skipped unreadable image %s (%s)", key, reason)
        if self.total >= LOGGED > self.total - len(skipped):
            log.warning("further unreadable images are listed in %s", self.file or "the log")
        if self.file is not None and skipped:
            self.file.write(json_lines(skipped).encode())
