"""The store at which the processes of a run meet before there is a process group.

They exchange texts, which are compared and printed and never executed.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from ..common.host import silenced
from ..common.ranks import environment_rank, without_srun, world_variables
from ..common.text import reason
from .stores import tcp_store
from .watchdog import going_on

_READ = 10.0  # seconds that rank 0, which may hold the store, waits for the others to read
REPORT_AFTER, REPORT_EVERY = 10.0, 60.0  # seconds until a wait is reported, and reported again


class Meeting:
    """The processes of a run at their store.

    Args:
        store: None for a process alone.
        rank: of this process.
        size: number of processes.
        place: host and port of the store, for messages.
        timeout: seconds to wait for the others in each exchange.
        group_timeout: seconds of an operation of the later process group; 0 = ``timeout``.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        size: int,
        place: str,
        timeout: float,
        group_timeout: float = 0.0,
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.place, self.timeout = place, timeout
        self.group_timeout = group_timeout or timeout
        if store is not None:
            store.set(f"host/{rank}", socket.gethostname())

    def pulses(self) -> Pulses | None:
        """Return a second connection, for another thread; None for a process alone."""
        if self.store is None:
            return None
        return Pulses(self.store.clone(), self.rank, self.size, self.place)

    def exchange(
        self,
        name: str,
        text: str,
        judge: Callable[[list[str]], str],
        timeout: float | None = None,
    ) -> str:
        """Collect the texts of all ranks, and return rank 0's answer on every rank.

        Args:
            name: of this exchange; every rank takes part in the same ones, once.
            text: of this rank.
            judge: makes the answer from the texts by rank; called on rank 0.
            timeout: seconds; default: the meeting's.

        Raises:
            TimeoutError: some ranks did not come in time; it names them by host, on every rank.
        """
        if self.store is None:
            return judge([text])
        store, limit = self.store, self.timeout if timeout is None else timeout
        store.set(f"{name}/{self.rank}", text)
        if self.rank == 0:
            late = self._late(name, limit)
            answer = "" if late else judge([t.decode() for t in store.multi_get(self._keys(name))])
            store.set(f"{name}/answer", json.dumps([late, answer]))
            if not late:
                _poll(lambda: store.add(f"{name}/read", 0) >= self.size - 1, _READ)
            else:
                time.sleep(1.0)  # so that the ranks that came can read
        else:
            first, keys = [f"{name}/0"], [f"{name}/answer"]
            there = _poll(lambda: store.check(first), limit + _READ, lambda: self._awaited(first))
            # Rank 0 may have come last. It then waits as long for the others, and names them.
            if not there or not _poll(lambda: store.check(keys), limit + _READ):
                raise TimeoutError(
                    f"rank 0 at {self.place} does not answer ({name}; {world_variables()})"
                )
            late, answer = json.loads(store.get(f"{name}/answer"))
            store.add(f"{name}/read", 1)
        if late:
            raise TimeoutError(late)
        return answer

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(self.size)]

    def _late(self, name: str, timeout: float) -> str:
        """Wait for the texts of all ranks; return a line about those that are missing."""
        store, keys = self.store, self._keys(name)
        assert store is not None
        if _poll(lambda: store.check(keys), timeout, lambda: self._awaited(keys)):
            return ""
        late = [rank for rank, key in enumerate(keys) if not store.check([key])]
        return (
            f"after {timeout:g} s {len(late)} of {self.size} processes have not come to "
            f"{self.place} ({name}): {_whose(store, late)}; {_advice()}"
        )

    def _awaited(self, keys: list[str]) -> str:
        """Return a line about the ranks whose keys are missing."""
        assert self.store is not None
        late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return (
            f"rank {self.rank} waits at {self.place} for {len(late)} of {self.size} processes: "
            f"{_whose(self.store, late)}; {_advice()}"
        )


class Pulses:
    """The ranks' reports of progress while they run; each replaces the rank's former one.

    Attributes:
        period: seconds between two reports of a rank.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, place: str) -> None:
        self._store, self.rank, self.size, self.place = store, rank, size, place
        inner = store.underlying_store if isinstance(store, dist.PrefixStore) else store
        # A file store grows with every report.
        self.period = 10.0 if isinstance(inner, dist.FileStore) else 2.0

    def say(self, text: str) -> None:
        """Report this rank's progress."""
        self._store.set(f"pulse/{self.rank}", text)

    def hear(self) -> dict[int, str]:
        """Return the last report of each rank that has made one."""
        keys = [f"pulse/{rank}" for rank in range(self.size)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        texts = self._store.multi_get(keys) if keys else []
        return {
            int(key.partition("/")[2]): text.decode() for key, text in zip(keys, texts, strict=True)
        }

    def whose(self, ranks: list[int]) -> str:
        """Return ``ranks`` by their hosts, for messages."""
        return _whose(self._store, ranks)


def _whose(store: dist.Store, ranks: list[int]) -> str:
    """Return ``ranks`` by their hosts; those that never connected have none."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        known = store.check([f"host/{rank}"])
        host = store.get(f"host/{rank}").decode() if known else "never connected"
        by_host.setdefault(host, []).append(rank)
    return ", ".join(f"{host} ({spans(some)})" for host, some in by_host.items())


def _advice() -> str:
    """Return the variables that give the number of processes, and the likely mistake."""
    advice = "were all of them started, and do they go on?"
    if without_srun():
        advice = "no srun started this process: put srun before the command, which starts them all"
    return f"{world_variables()} in the environment ({advice})"


def spans(ranks: list[int]) -> str:
    """Return sorted ranks as text: ``rank 3``, ``ranks 0-7, 9``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def open_store(
    address: str, port: int, rank: int, size: int, timeout: float, serve: bool
) -> dist.Store:
    """Open the store of all ranks, or connect to it.

    Args:
        address: of rank 0.
        port: of the store.
        rank: of this process.
        size: number of processes.
        timeout: seconds to wait for the store.
        serve: this process opens it, because no launcher does.

    Raises:
        ConnectionError: the store cannot be opened or reached.
    """
    place = f"{address}:{port}"
    if serve:
        _await_name(address, timeout)
    else:
        _await_port(address, port, rank, timeout)
    made: list[dist.Store | Exception] = []

    def make() -> None:
        try:
            made.append(
                tcp_store(
                    address, port, size, serve, timedelta(seconds=timeout),
                    wait_for_workers=False, multi_tenant=True,
                )
            )  # fmt: skip
        except Exception as error:
            made.append(error)

    # In a thread: the call waits for ever if another program answers at that port.
    thread = threading.Thread(target=make, daemon=True)
    with silenced():
        thread.start()
        thread.join(timeout + 5)
    found = made[0] if made else None
    if isinstance(found, dist.Store):
        return found
    if serve and "EADDRINUSE" in str(found):
        raise ConnectionError(
            f"MASTER_PORT={port} is taken on {socket.gethostname()}, perhaps by another training: "
            "set it to a free one, the same for every process"
        )
    if serve:
        why = reason(found) if found else "no answer"
        raise ConnectionError(f"rank 0 cannot open its store at {place}: {why}")
    raise ConnectionError(
        f"what answers at {place} is not rank 0 of this run: check MASTER_ADDR and MASTER_PORT, "
        "and that nothing else uses that port"
    )


def _await_name(address: str, timeout: float) -> None:
    """Wait until this machine's name resolves; that of a new pod takes a while.

    Raises:
        ConnectionError: it does not resolve in time.
    """
    deadline, report = time.monotonic() + timeout, _Report()
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            why = f"MASTER_ADDR={address}: {getattr(error, 'strerror', None) or error}"
        going_on()
        report.due(partial("rank 0 waits for its own name to be known ({})".format, why))
        if time.monotonic() >= deadline:
            raise ConnectionError(
                f"rank 0 cannot open its store after {timeout:g} s ({why}): set MASTER_ADDR to a "
                "name or address of this machine that the others reach"
            )
        time.sleep(min(0.5, max(deadline - time.monotonic(), 0.05)))


def _await_port(address: str, port: int, rank: int, timeout: float) -> None:
    """Wait for rank 0 to listen; its name and route may come later than this process.

    Raises:
        ConnectionError: rank 0 does not answer in time.
    """
    deadline, report = time.monotonic() + timeout, _Report()
    while True:
        try:
            socket.create_connection((address, port), timeout=min(timeout, 5.0)).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        going_on()
        place = f"{address}:{port} ({why})"
        report.due(partial("rank {} waits for rank 0 at {}; {}".format, rank, place, _advice()))
        if time.monotonic() >= deadline:
            raise ConnectionError(
                f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} "
                f"after {timeout:g} s ({why}): check MASTER_ADDR and MASTER_PORT, that rank 0 has "
                f"started, and that no firewall is between; {_advice()}"
            )
        time.sleep(min(0.5, max(deadline - time.monotonic(), 0.05)))


def _poll(done: Callable[[], bool], timeout: float, about: Callable[[], str] | None = None) -> bool:
    """Poll ``done`` and return whether it came true; the store's own wait prints pages of errors.

    Args:
        done: asks the store.
        timeout: seconds.
        about: returns a line to print when the wait is long.
    """
    deadline, pause, report = time.monotonic() + timeout, 0.005, _Report()
    while not done():
        going_on()
        if time.monotonic() >= deadline:
            return False
        if about is not None:
            report.due(about)
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
    return True


class _Report:
    """A report on a wait: a line after 10 seconds, and again each minute."""

    def __init__(self) -> None:
        self._next = time.monotonic() + REPORT_AFTER
        if environment_rank()[1]:  # the first process of each node reports the same
            self._next += REPORT_EVERY

    def due(self, line: Callable[[], str]) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REPORT_EVERY
            print(f"swin-moe: {line()}", file=sys.stderr, flush=True)
