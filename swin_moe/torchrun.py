"""torchrun for this program: ``python -m swin_moe.torchrun``, with torchrun's own options.

Three things differ. When a process fails, the process has told why; torchrun's page about itself is
left out. SIGTERM and SIGUSR1, by which schedulers announce that they take a node away, are handed
to the processes, which save and end, instead of ending them. And a failure that would only repeat
itself, or an end that was asked for, is not answered by a restart, whatever --max-restarts says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
FINAL = "SWIN_MOE_FINAL"  # a file that a process makes if it is not to be restarted


class _Agent(LocalElasticAgent):
    """Restarts nothing once a process has said that it is for good."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        final = bool(_told) or Path(os.environ[FINAL]).exists()
        if result.state == WorkerState.FAILED and final:
            self._remaining_restarts = 0
        return result

    def _start_workers(self, worker_group: Any) -> Any:
        started = super()._start_workers(worker_group)
        if _told:  # before there was one to tell
            _pass_on(_told[-1], None)
        return started


_told: list[int] = []  # signals that came so far


def _pass_on(number: int, _frame: object) -> None:
    _told.append(number)
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    launcher.LocalElasticAgent = _Agent  # type: ignore[misc]
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    with tempfile.TemporaryDirectory(prefix="swin_moe-") as folder:
        os.environ[FINAL] = str(Path(folder) / "final")
        yield


def main() -> int:
    arguments = run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    try:
        with _prepared():
            run.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # a process that exits by itself has said why
            name = signal.Signals(-failure.exitcode).name
            print(f"swin-moe: error: rank {rank} was killed by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ValueError as error:
        print(f"swin-moe: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
