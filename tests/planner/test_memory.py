"""Predicted memory compared with the allocator's statistics of real training steps."""

import json

from tests.parallel import start


def test_predictions_are_within_ten_percent(tmp_path):
    """Three cells of the benchmark, which has the same bound for all."""
    path = tmp_path / "cells.json"
    done = start("benchmarks.planner", "--quick", "--json", str(path)).finish(timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 3
    for cell in cells:
        assert max(abs(off) for off in cell["off"].values()) <= 0.10, cell
