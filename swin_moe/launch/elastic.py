"""torchrun's agent: starts, signals and restarts the processes of a node.

A process that fails prints why, so torchrun's own error page is left out. Stop signals
(``signals.py``) are passed on to the processes, which save and end. The agent does not restart
processes after a stop signal, or after a failure that would repeat itself, even if --max-restarts
allows it. Nodes that do not meet are reported in one line (``nodes.py``). The processes are forked
from one that has imported everything (``fork_server.py``).
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
FINAL = "SWIN_MOE_FINAL"  # environment variable: a file; a process makes it to prevent a restart
# The modules of a training, and sympy, which torch imports late.
PRELOADED = ("swin_moe.train", "swin_moe.evaluate", "sympy")


class _Process(SubprocessHandler):
    """A process of this node, forked if it is a Python module."""

    server: fork_server.Server | None = None
    living: ClassVar[list[Any]] = []
    group: ClassVar[list[Any]] = []  # all that were started together, the ended ones included

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        forked = self.server and args[:3] == (sys.executable, "-u", "-m")
        try:
            process = self._fork(args, env) if forked else super()._popen(args, env)
        except OSError as error:
            log.warning("the fork server is gone (%s): starting a new interpreter", error)
            process = super()._popen(args, env)
        self.living[:] = [other for other in self.living if other.poll() is None] + [process]
        self.group.append(process)
        return process

    def close(self, death_sig: signal.Signals | None = None) -> None:
        if any(process.poll() not in (None, 0) for process in self.group):
            _closing().touch()  # SIGTERM then follows another's failure, and asks for no save
        try:
            super().close(death_sig)
        except ProcessLookupError:  # it has ended, and only its server has noticed
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


class _Agent(LocalElasticAgent):
    """torch's agent, which restarts nothing after a stop signal or a final failure."""

    nodes: Nodes | None = None  # None: all processes are on this machine

    def _rendezvous(self, worker_group: Any) -> None:
        handler = worker_group.spec.rdzv_handler
        if self.nodes is None:
            super()._rendezvous(worker_group)
            return
        # Each round gets a new store. torch would reuse the first one: its address is wrong after
        # rank 0 has moved to another node, and it holds the addresses of dead processes.
        handler._bootstrap_store_info = None
        handler._create_tcp_store_server = partial(tcp_store, is_master=True, multi_tenant=True)
        handler.num_nodes_waiting = partial(self.nodes.newcomers, handler)
        try:
            self.nodes.agree(handler)
            with self.nodes.watched(handler):
                super()._rendezvous(worker_group)
        except BaseException:
            handler.shutdown = lambda: True  # a node that was not let in must not end the job
            raise
        # A node that joined late, or alone failed, has another count of restarts than the others.
        store, size = worker_group.store, worker_group.group_world_size
        store.set(f"swin_moe/restarts/{worker_group.group_rank}", str(self._remaining_restarts))
        counts = store.multi_get([f"swin_moe/restarts/{rank}" for rank in range(size)])
        self._remaining_restarts = min(int(count) for count in counts)

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        final = bool(_signals) or Path(os.environ[FINAL]).exists()
        if result.state == WorkerState.FAILED and final:
            self._remaining_restarts = 0
        return result

    def _start_workers(self, worker_group: Any) -> Any:
        if _signals:
            raise Stopped
        # The processes before these may have been ended because a node joined.
        Path(os.environ[FINAL]).unlink(missing_ok=True)
        _closing().unlink(missing_ok=True)
        _Process.group.clear()
        started = super()._start_workers(worker_group)
        if _signals:  # it came before the processes were there
            _send(_signals[-1])
        return started


def _closing() -> Path:
    """Return the file that exists while the processes are being ended."""
    return Path(os.environ[FINAL]).with_name("closing")


_signals: list[int] = []  # those that have come


def pass_on(number: int, _frame: object) -> None:
    """Send a signal on to the processes of this node: a handler for the launcher."""
    _signals.append(number)
    _send(number)


def interrupted_twice() -> bool:
    """Return whether SIGINT has come more than once: the processes are then killed."""
    return _signals.count(signal.SIGINT) > 1


def _send(number: int) -> None:
    for process in _Process.living:
        process.send_signal(signal.SIGKILL if interrupted_twice() else number)


def _prepare() -> None:
    launcher.LocalElasticAgent = _Agent  # type: ignore[misc]
    processes.get_subprocess_handler = _Process  # type: ignore[assignment]
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _run(arguments: Any, folder: Path) -> None:
    """Meet the other nodes and run the processes.

    Raises:
        Unmet: the nodes did not meet, or lost one another.
    """
    _prepare()
    if not arguments.log_dir and arguments.redirects == arguments.tee == "0":
        arguments.log_dir = os.devnull  # torch would make a folder and leave it
    nodes = _Agent.nodes = find_nodes(arguments, lambda: bool(_signals))
    if nodes is None:
        if arguments.rdzv_backend in ("static", "c10d") and arguments.nnodes in ("1", "1:1"):
            meet_on_this_machine(arguments, folder)
        run.run(arguments)
        return
    meet_warily()
    if nodes.interface:  # otherwise gloo takes the address of the host's own name
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
    """Run torchrun with the options of the command line and return the exit code."""
    install(pass_on)
    try:
        with fork_server.private_folder() as folder:
            os.environ[FINAL] = str(folder / "final")
            return _serve(folder)
    except OSError as error:
        return _fail(f"the launcher cannot write its files: {error}; set TMPDIR", FAILED)


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
        return _fail(too_early(_signals[0]), code_of(_signals[0]))
    except Unmet as error:
        return _fail(str(error), FAILED)
    except ValueError as error:
        return _fail(str(error), WRONG_USE)
    return 0


def _failed(error: ChildFailedError) -> int:
    """Return the exit code for processes that failed, and print why if they could not."""
    if interrupted_twice():
        return _fail(TWICE, INTERRUPTED)
    for number, code in ((signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)):
        stopped = [f.local_rank for f in error.failures.values() if f.exitcode == code]
        if stopped and 0 not in stopped:  # rank 0, which prints, could not yet handle signals
            return _fail(too_early(_signals[0] if _signals else number), code)
        if stopped:
            return code
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode
    if -failure.exitcode in _signals:  # no process could yet handle signals
        return _fail(too_early(_signals[0]), code_of(_signals[0]))
    name = signal.Signals(-failure.exitcode).name
    return _fail(f"rank {rank} was killed by {name}", 128 - failure.exitcode)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"swin-moe: error: {message}", file=sys.stderr, flush=True)
    return code
