"""Predicted memory against the allocator's own account of real training steps."""

import json

from tests.parallel import start


def test_predictions_are_within_ten_percent(tmp_path):
    """A few cells of the benchmark, which holds all of them to the same bound."""
    path = tmp_path / "cells.json"
    done = start("benchmarks.planner", "--quick", "--json", str(path)).finish(timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 3
    for cell in cells:
        assert max(abs(off) for off in cell["off"].values()) <= 0.10, cell
