"""Marks, the fork server of the session, and one thread per test process.

The processes of a session run side by side, so that more threads would only wait.
"""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; for all that tests start, too
import torch

from swin_moe import ops
from tests import grid, parallel, server
from tests.golden import MEASURED

torch.set_num_threads(1)

# A test file that starts programs is of the kind "process"; folders of their own are other kinds.
STARTERS = (parallel.run_worker, parallel.start, parallel.swin_moe, parallel.train)
FOLDERS = ("cluster", "faults")


def pytest_addoption(parser):
    parser.addoption("--parity", action="store_true", help="print the errors on golden fixtures")
    parser.addoption("--matrix", type=Path, help="write the table of the equivalence tests here")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that pytest-xdist's workers belong to
        grid.choose_day()
        # Once, before tests with time limits: the results are kept for all processes.
        ops.decide(
            ops.signature(op, "cpu", dtype)
            for op in ops.status()
            for dtype in (torch.float32, torch.bfloat16)
        )
        forks = server.begin(parallel.environment())
        config.add_cleanup(lambda: server.end(forks))


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.parent.name
        starts = any(v is s for v in vars(item.module).values() for s in STARTERS)
        kind = folder if folder in FOLDERS else "process" if starts else "unit"
        item.add_marker(getattr(pytest.mark, kind))


def pytest_terminal_summary(terminalreporter, config):
    """The day of the sample, and the parity table.

    The table needs a session without -n, for the tests' processes keep their figures.
    """
    terminalreporter.write_line(f"sampled cells: {grid.DAY}={grid.day()} repeats them")
    if not config.getoption("--parity"):
        return
    terminalreporter.write_line(
        "\n| fixture | tensors | worst error / atol | of | error of logits |"
    )
    terminalreporter.write_line("|---|---|---|---|---|")
    for fixture, rows in sorted(MEASURED.items()):
        exact = sum(atol == 0 for _, _, atol in rows)
        name, share = max(((n, e / a) for n, e, a in rows if a), key=lambda row: row[1])
        logits = max((e for n, e, _ in rows if n.endswith(("logits", "loss", "output"))), default=0)
        count = f"{len(rows)}" + (f", {exact} of them exact" if exact else "")
        line = f"| `{fixture}` | {count} | {share:.2f} | `{name}` | {logits:.1e} |"
        terminalreporter.write_line(line)
