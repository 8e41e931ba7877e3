"""torchrun's agent for this program: how it starts, signals and restarts the processes of a node.

A process that fails has printed why, so torchrun's own page is left out. Signals that ask for an
end (``signals.py``) are passed on to the processes, which save and end. There is no restart after a
failure that would only repeat itself or an end that was asked for, whatever --max-restarts says.
Nodes that do not meet are reported in one line (``nodes.py``), and those that meet again agree on
what to begin. A single node meets nobody (``rendezvous.py``). The processes are forked from one
that has imported everything (``fork_server.py``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed import DistError, run
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.launcher import api as launcher

from ..common import fork_server
from ..common.signals import INTERRUPTED, PREEMPTED, TWICE, code_of, install, too_early
from ..distributed.stores import tcp_store
from .nodes import Nodes, Stopped, Unmet, find_nodes
from .rendezvous import meet_on_this_machine, meet_warily

log = logging.getLogger("swin_moe")

FAILED, WRONG_USE = 1, 2
FINAL = "SWIN_MOE_FINAL"  # a file that a process makes if it is not to be restarted
# What every process needs, and what training imports on the way.
PRELOADED = ("swin_moe.train", "swin_moe.evaluate", "sympy")


class _Process(SubprocessHandler):
    """A process of this node: forked if it is a Python module, as it nearly always is."""

    server: fork_server.Server | None = None
    living: ClassVar[list[Any]] = []
    group: ClassVar[list[Any]] = []  # all that were started together, the ended ones too

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        forked = self.server and args[:3] == (sys.executable, "-u", "-m")
        try:
            process = self._fork(args, env) if forked else super()._popen(args, env)
        except OSError as error:
            log.warning("the fork server is gone (%s): the process is started afresh", error)
            process = super()._popen(args, env)
        self.living[:] = [other for other in self.living if other.poll() is None] + [process]
        self.group.append(process)
        return process

    def close(self, death_sig: signal.Signals | None = None) -> None:
        if any(process.poll() not in (None, 0) for process in self.group):
            _closing().touch()  # SIGTERM is no order to save: another process has failed
        try:
            super().close(death_sig)
        except ProcessLookupError:  # its server knows that it has ended, and we do not yet
            for file in (self._stdout, self._stderr):
                if file:
                    file.close()

    def _fork(self, args: tuple[str, ...], env: dict[str, str]) -> fork_server.Child:
        assert self.server is not None
        return fork_server.Child(
            self.server.path,
            args[3],
            args[4:],
            environment=env,
            name=f"swin-moe r{env.get('RANK', '')}",
            stdout=self._stdout or 1,
            stderr=self._stderr or 2,
        )


def _process(**options: Any) -> SubprocessHandler:
    return _Process(**options)


class _Agent(LocalElasticAgent):
    """Restarts nothing once a process has said that it is for good."""

    nodes: Nodes | None = None  # None: all processes are on this machine

    def _rendezvous(self, worker_group: Any) -> None:
        handler = worker_group.spec.rdzv_handler
        if self.nodes is None:
            super()._rendezvous(worker_group)
            return
        # Every round begins with a store of its own: torch keeps the first one's address where
        # rank 0 has moved to another node, and in its store the addresses of dead processes.
        handler._bootstrap_store_info = None
        handler._create_tcp_store_server = partial(tcp_store, is_master=True, multi_tenant=True)
        handler.num_nodes_waiting = partial(self.nodes.newcomers, handler)
        try:
            self.nodes.agree(handler)
            with self.nodes.watched(handler):
                super()._rendezvous(worker_group)
        except BaseException:
            handler.shutdown = lambda: True  # who was not let in must not end the others' job
            raise
        # A node that joins late or was alone in failing has counted other restarts than the others.
        store, size = worker_group.store, worker_group.group_world_size
        store.set(f"swin_moe/restarts/{worker_group.group_rank}", str(self._remaining_restarts))
        counts = store.multi_get([f"swin_moe/restarts/{rank}" for rank in range(size)])
        self._remaining_restarts = min(int(count) for count in counts)

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        final = bool(_told) or Path(os.environ[FINAL]).exists()
        if result.state == WorkerState.FAILED and final:
            self._remaining_restarts = 0
        return result

    def _start_workers(self, worker_group: Any) -> Any:
        if _told:
            raise Stopped
        # Those before were perhaps told to end for the sake of a node that has joined.
        Path(os.environ[FINAL]).unlink(missing_ok=True)
        _closing().unlink(missing_ok=True)
        _Process.group.clear()
        started = super()._start_workers(worker_group)
        if _told:  # before there was one to tell
            _send(_told[-1])
        return started


def _closing() -> Path:
    """A file that is there while the processes are being ended."""
    return Path(os.environ[FINAL]).with_name("closing")


_told: list[int] = []  # signals that came so far


def _pass_on(number: int, _frame: object) -> None:
    _told.append(number)
    _send(number)


def _send(number: int) -> None:
    for process in _Process.living:
        process.send_signal(signal.SIGKILL if _interrupted_twice() else number)


def _interrupted_twice() -> bool:
    return _told.count(signal.SIGINT) > 1


def _prepare() -> None:
    launcher.LocalElasticAgent = _Agent  # type: ignore[misc]
    processes.get_subprocess_handler = _process  # type: ignore[assignment]
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _run(arguments: Any, folder: Path) -> None:
    """Meet the other nodes and run; every way in which that can fail on the way is an ``Unmet``."""
    _prepare()
    if not arguments.log_dir and arguments.redirects == arguments.tee == "0":
        arguments.log_dir = os.devnull  # torch would make a folder and leave it
    nodes = _Agent.nodes = find_nodes(arguments, lambda: bool(_told))
    if nodes is None:
        if arguments.rdzv_backend in ("static", "c10d") and arguments.nnodes in ("1", "1:1"):
            meet_on_this_machine(arguments, folder)
        run.run(arguments)
        return
    meet_warily()
    if nodes.interface:  # else gloo would take the address of the host's own name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", nodes.interface)
    try:
        run.run(arguments)
    except RendezvousTimeoutError:
        raise nodes.timed_out() from None
    except RendezvousClosedError:
        raise Unmet(
            f"another node ended the job of {nodes.endpoint}; its output says why"
        ) from None
    except (RendezvousConnectionError, DistError):
        raise nodes.lost() from None


def main() -> int:
    """Run torchrun with the options of the command line; returns the exit code."""
    install(_pass_on)
    try:
        with fork_server.private_folder() as folder:
            os.environ[FINAL] = str(folder / "final")
            return _serve(folder)
    except OSError as error:
        return _fail(f"no place for the launcher's files: {error}; set TMPDIR", FAILED)


def _serve(folder: Path) -> int:
    if sys.platform == "linux":
        try:
            _Process.server = fork_server.start(PRELOADED, folder)
        except OSError as error:
            log.warning("no fork server (%s): each process imports everything itself", error)
    try:
        return _main(folder)
    finally:
        if _Process.server:
            _Process.server.close()


def _main(folder: Path) -> int:
    arguments = run.parse_args(["--signals-to-handle", "SIGQUIT", *sys.argv[1:]])
    try:
        _run(arguments, folder)
    except ChildFailedError as error:
        return _failed(error)
    except SignalException as error:
        return 128 + error.sigval
    except Stopped:
        return _fail(too_early(_told[0]), code_of(_told[0]))
    except Unmet as error:
        return _fail(str(error), FAILED)
    except ValueError as error:
        return _fail(str(error), WRONG_USE)
    return 0


def _failed(error: ChildFailedError) -> int:
    """The exit code for processes that failed; those that exit by themselves have said why."""
    if _interrupted_twice():
        return _fail(TWICE, INTERRUPTED)
    for number, code in ((signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)):
        stopped = [f.local_rank for f in error.failures.values() if f.exitcode == code]
        if stopped and 0 not in stopped:  # the rank that prints was not yet ready for signals
            return _fail(too_early(_told[0] if _told else number), code)
        if stopped:
            return code
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode
    if -failure.exitcode in _told:  # before any was ready
        return _fail(too_early(_told[0]), code_of(_told[0]))
    name = signal.Signals(-failure.exitcode).name
    return _fail(f"rank {rank} was killed by {name}", 128 - failure.exitcode)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"swin-moe: error: {message}", file=sys.stderr, flush=True)
    return code
