"""Brings the nodes of torchrun together by c10d's rendezvous, with a time-out and clear errors.

torch guesses whether this machine is the master, and by which name the others reach this node. It
waits silently. This module finds both out, and reports errors with host and port.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

PORT = 29500
TIMEOUT = 300  # seconds for all nodes to come
_PATIENCE = 10.0  # seconds until a wait is reported
_RESOLVE = 30.0  # seconds until a name must resolve; that of a new pod takes a while


class Unmet(Exception):
    """The nodes did not meet, or lost one another; the message is one line."""


class Stopped(Exception):
    """A stop signal came while this node was waiting for others."""


@dataclass
class Nodes:
    """The other nodes, and this node's wait for them.

    Attributes:
        endpoint: HOST:PORT of the master.
        timeout: seconds.
        number: of nodes, or MIN:MAX.
        stop_asked: returns whether a stop signal has come.
        interface: network interface by which this node reaches the others; empty if unknown.
    """

    endpoint: str
    timeout: float
    number: str
    stop_asked: Callable[[], bool]
    interface: str = ""
    came: list[str] = field(default_factory=list)  # the most nodes that were here at one time

    @contextlib.contextmanager
    def watched(self, handler: Any) -> Iterator[None]:
        """Return a context in which the wait of torch's handler is reported and ends in time.

        Raises:
            Stopped: a stop signal came.
            Unmet: there is no place for this node.
        """
        holder = handler._state_holder
        sync, began, reported = holder.sync, time.monotonic(), 0
        self.came = []

        def watching() -> Any:
            nonlocal reported
            result = sync()
            if self.stop_asked():
                raise Stopped
            state, waited = holder.state, time.monotonic() - began
            here = sorted(node.addr for node in state.participants)
            if len(here) >= len(self.came):
                self.came = here
            if waited > self.timeout and handler._this_node in state.redundancy_list:
                raise Unmet(
                    f"{self.endpoint} has its {self.number} nodes ({', '.join(here)}), and none "
                    f"left within {self.timeout:.0f} s: this one is one too many, or --nodes is "
                    "too low"
                )
            if waited > _PATIENCE and len(here) != reported and not state.complete:
                reported = len(here)
                _report(f"waiting at {self.endpoint}: {reported} of {self.number} nodes are here")
            return result

        holder.sync = watching
        try:
            yield
        finally:
            holder.sync = sync

    def newcomers(self, handler: Any) -> int:
        """Return how many nodes wait to join; 0 while the master does not answer.

        Healthy processes go on after the master's launcher has ended: at the end of a job, it may
        be the first to end. If they fail later, the nodes cannot meet again, and that is reported.
        """
        from torch.distributed import DistError
        from torch.distributed.elastic.rendezvous import RendezvousConnectionError

        try:
            return int(type(handler).num_nodes_waiting(handler))
        except (RendezvousConnectionError, DistError):
            return 0

    def agree(self, handler: Any) -> None:
        """Raise ``ValueError`` if another node was started with another value of --nodes."""
        mine = f"{self.number} on {handler._this_node.addr}"
        first = handler._store.compare_set("swin_moe/nodes", "", mine).decode()
        if first.split()[0] != self.number:
            raise ValueError(
                f"--nodes {self.number} here and --nodes {first}: give every node the same "
                f"(master {self.endpoint})"
            )

    def timed_out(self) -> Unmet:
        """Return the error of a meeting at which some nodes were missing."""
        names = ", ".join(self.came)
        return Unmet(
            f"{len(self.came)} of {self.number} nodes came to {self.endpoint} within "
            f"{self.timeout:.0f} s ({names}): start the same command on the others, with clocks "
            "that agree to some seconds, or allow longer by --timeout"
        )

    def lost(self) -> Unmet:
        """Return the error of a master that no longer answers."""
        return Unmet(
            f"lost the master at {self.endpoint}: its launcher has ended, or the link was down "
            f"for more than {self.timeout:.0f} s; the same command on every node goes on from the "
            "last checkpoint"
        )


def find_nodes(arguments: Any, stop_asked: Callable[[], bool]) -> Nodes | None:
    """Wait for the master, and find out what torch would guess.

    Args:
        arguments: of torchrun; ``rdzv_conf``, ``rdzv_endpoint`` and ``local_addr`` are changed.
        stop_asked: returns whether a stop signal has come.

    Returns:
        None if there are no other nodes.

    Raises:
        ValueError: the name of the master does not resolve, or its port is taken.
        Unmet: the master cannot be reached.
        Stopped: a stop signal came.
    """
    if arguments.standalone or arguments.rdzv_backend != "c10d" or not arguments.rdzv_endpoint:
        return None
    from torch.distributed.elastic.rendezvous.utils import (
        _matches_machine_hostname,
        parse_rendezvous_endpoint,
    )

    host, port = parse_rendezvous_endpoint(arguments.rdzv_endpoint, PORT)
    settings = dict(pair.split("=", 1) for pair in arguments.rdzv_conf.split(",") if pair)
    timeout = float(settings.get("join_timeout", TIMEOUT))
    nodes = Nodes(f"{host}:{port}", timeout, arguments.nnodes, stop_asked)
    began = time.monotonic()
    address = _resolve(host, min(timeout, _RESOLVE))
    if _is_here(address):
        if arguments.nnodes in ("1", "1:1"):
            return None
        arguments.local_addr = arguments.local_addr or host
        # If torch finds this machine to be the master, several launchers may share it.
        if not (_another_hosts(port) or _matches_machine_hostname(host)):
            settings["is_host"] = "true"
    else:
        settings["is_host"] = "false"
        own = _way_to(address, port, nodes)
        _wait_for_master(address, port, nodes)
        arguments.local_addr = arguments.local_addr or own
        address = own
    nodes.interface = _interface(address)
    left = max(timeout - (time.monotonic() - began), 1.0)
    settings["join_timeout"] = f"{left:.0f}"
    settings.setdefault("read_timeout", f"{max(timeout, 1):.0f}")
    arguments.rdzv_conf = ",".join(f"{key}={value}" for key, value in settings.items())
    arguments.rdzv_endpoint = nodes.endpoint
    return nodes


def check_port(host: str, port: int) -> None:
    """Raise ``ValueError`` if ``host`` is this machine and something else listens at ``port``."""
    with contextlib.suppress(OSError, UnicodeError):  # perhaps only other machines resolve it
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        if _is_here(str(address)):
            _another_hosts(port)


def _resolve(host: str, patience: float) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() > deadline:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(
                    f"--master {host}: this machine does not know that name ({reason}); give a "
                    "name that every node resolves, or an address"
                ) from None
            time.sleep(1.0)


def _is_here(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback or bool(_interface(address))


def _interface(address: str) -> str:
    """Return the interface that has ``address``; empty for loopback or if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(a.address.partition("%")[0] == address for a in addresses):
            return name
    return ""


def _another_hosts(port: int) -> bool:
    """Return whether another launcher of ours on this machine already listens as the master.

    Raises:
        ValueError: another program listens at ``port``.
    """
    if not _taken(port):
        return False
    owner = "another program"
    for connection in psutil.net_connections("tcp"):
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        if listens and connection.pid:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(connection.pid)
                if "swin_moe.launch.torchrun" in process.cmdline():
                    return True
                owner = f"{process.name()} (process {connection.pid})"
    raise ValueError(
        f"port {port} of this machine, the master, is taken by {owner}: give another by "
        "--master HOST:PORT, on every node"
    )


def _taken(port: int) -> bool:
    """Return whether something listens at ``port`` of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _way_to(address: str, port: int, nodes: Nodes) -> str:
    """Return this machine's address on the route to ``address``; nothing is sent.

    Raises:
        Unmet: there is no route.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError as error:
            raise Unmet(
                f"no way from this machine to the master at {nodes.endpoint}: {error.strerror}"
            ) from None
        return str(probe.getsockname()[0])


def _wait_for_master(address: str, port: int, nodes: Nodes) -> None:
    began, reported = time.monotonic(), False
    while True:
        left = nodes.timeout - (time.monotonic() - began)
        try:
            socket.create_connection((address, port), timeout=max(min(left, 5.0), 0.1)).close()
            return
        except OSError as error:
            reason = error.strerror or "it does not answer"
        if nodes.stop_asked():
            raise Stopped
        if left <= 0:
            raise Unmet(
                f"the master at {nodes.endpoint} cannot be reached within "
                f"{nodes.timeout:.0f} s ({reason}): check its name, that the same command runs "
                f"there, and that no firewall closes port {port}"
            )
        if not reported and time.monotonic() - began > _PATIENCE:
            reported = True
            _report(f"waiting for the master at {nodes.endpoint}: {reason}")
        time.sleep(0.5)


def _report(line: str) -> None:
    print(f"swin-moe: {line}", file=sys.stderr, flush=True)
