"""Says, once, when training waits for its images."""

from __future__ import annotations

import os

SHARE = 0.2  # of the time, from which on the loader is what holds training up
IN_A_ROW = 3  # logs: a start of workers is no reason


class LoaderWatch:
    """Looks at the share of time that updates waited for their images."""

    def __init__(self) -> None:
        self._in_a_row, self._told = 0, False

    def check(self, share: float, workers: int) -> str:
        """A warning of one line if it is due, else empty.

        Args:
            share: of the time since the last log, over all ranks.
            workers: processes that load for each rank.
        """
        self._in_a_row = self._in_a_row + 1 if share > SHARE else 0
        if self._told or self._in_a_row < IN_A_ROW:
            return ""
        self._told = True
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
