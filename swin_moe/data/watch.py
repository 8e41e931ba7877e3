"""One warning when training waits for its images."""

from __future__ import annotations

import os

SHARE = 0.2  # of the time; above it, the loader is the bottleneck
IN_A_ROW = 3  # logs: the start of the workers does not count


class LoaderWatch:
    """The share of time for which updates wait for their images, and whether it was reported."""

    def __init__(self) -> None:
        self._in_a_row, self._warned = 0, False

    def check(self, share: float, workers: int) -> str:
        """Return a one-line warning if it is due, otherwise an empty text.

        Args:
            share: waiting time / time since the last log, over all ranks.
            workers: processes that load for each rank.
        """
        self._in_a_row = self._in_a_row + 1 if share > SHARE else 0
        if self._warned or self._in_a_row < IN_A_ROW:
            return ""
        self._warned = True
        cores = len(os.sched_getaffinity(0))
        advice = (
            f"raise data.num_workers from {workers}, this process may use {cores} cores"
            if workers < cores
            else "its workers use all cores: store smaller images (swin-moe prepare-data "
            "--resize), or choose a cheaper augment.auto_augment"
        )
        return (
            f"the loader is the bottleneck, {share:.0%} of the time goes by in waiting ({advice})"
        )
