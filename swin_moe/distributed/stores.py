"""Stores for the processes of a run, closed to everybody else.

torch's store listens on all interfaces. Here the processes of one machine share a file that only
their user can open, and a store for several machines listens at one address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

FILE = "SWIN_MOE_STORE"  # environment variable: the file, set by the launcher
LOOPBACK = "127.0.0.1"


def tcp_store(
    host_name: str,
    port: int,
    world_size: int | None = None,
    is_master: bool = False,
    timeout: timedelta = timedelta(minutes=5),
    **options: Any,
) -> dist.TCPStore:
    """Return torch's store, which listens only at the address of ``host_name`` if that is possible.

    Args:
        host_name: of the process that opens the store.
        port: of the store; 0 = any.
        world_size: see :class:`torch.distributed.TCPStore`, as for the other arguments.
        is_master: this process opens the store.
        timeout: of its operations.
        options: of :class:`torch.distributed.TCPStore`.
    """
    listener = listen_at(host_name, port) if is_master else None
    if listener is None:
        return dist.TCPStore(host_name, port, world_size, is_master, timeout, **options)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host_name, port, world_size, True, timeout, master_listen_fd=listener.detach(), **options
    )


def listen_at(host: str, port: int) -> socket.socket | None:
    """Return a socket that listens only at the address of ``host``.

    Returns:
        None if the store must listen on all interfaces: the address belongs to no interface (as
        with NAT), or other nodes cannot reach it (Debian gives a host's own name a loopback
        address).
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    family, _, _, _, place = found[0]
    if ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback and not is_loopback(host):
        return None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(1024)
    except OSError:  # torch meets the same error and reports it
        listener.close()
        return None
    return listener


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine's loopback, so that all processes are on it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def stay_on_loopback(host: str) -> None:
    """Make gloo and NCCL listen on loopback only, if ``host``, where the processes meet, is it."""
    if not is_loopback(host):
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, name)
