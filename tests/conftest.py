"""One thread per test process: they run side by side, and more threads would only wait."""

from pathlib import Path

import torch

from tests import parallel, server
from tests.golden import MEASURED

torch.set_num_threads(1)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that pytest-xdist's workers belong to
        server.begin(parallel.environment())


def pytest_addoption(parser):
    parser.addoption("--parity", action="store_true", help="print the errors on golden fixtures")
    parser.addoption("--matrix", type=Path, help="write the table of the equivalence tests here")


def pytest_terminal_summary(terminalreporter, config):
    """The parity table; without -n, for the tests' processes keep their figures to themselves."""
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
