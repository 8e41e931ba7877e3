"""Lets the launchers of a run meet without running a pickle from the network.

torch's launchers keep their state as a pickle in a store. Any program that reaches the store's port
can write there, and a pickle can run code. On one machine, no store is opened. On several machines,
the state is read as plain data.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    c10d_rendezvous_backend,
    dynamic_rendezvous,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.utils.distributed import get_free_port

from ..distributed.stores import FILE, LOOPBACK, tcp_store

BACKEND = "swin_moe"  # --rdzv-backend: all processes are on this machine


class OneMachine(RendezvousHandler):
    """The rendezvous of a launcher without others, with a new file for each round.

    Args:
        folder: a folder that only this user can enter.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._round = folder, 0
        self._id = secrets.token_hex(16)

    def next_rendezvous(self) -> RendezvousInfo:
        self._round += 1
        os.environ[FILE] = str(self._folder / f"store-{self._round}")
        # The port is for other programs that open a store there.
        place = RendezvousStoreInfo(LOOPBACK, get_free_port())
        return RendezvousInfo(dist.HashStore(), 0, 1, place)

    def get_backend(self) -> str:
        return BACKEND

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: there are no other launchers."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._id

    def shutdown(self) -> bool:
        return True


def meet_on_this_machine(arguments: Any, folder: Path) -> None:
    """Change torchrun's ``arguments`` so that the processes meet in ``folder``."""

    def make(_: RendezvousParameters) -> RendezvousHandler:
        return OneMachine(folder)

    rendezvous_handler_registry._registry.pop(BACKEND, None)
    rendezvous_handler_registry.register(BACKEND, make)
    arguments.standalone, arguments.rdzv_backend = False, BACKEND
    arguments.rdzv_endpoint, arguments.rdzv_conf = "", ""


class _Unpickler(pickle.Unpickler):
    """An unpickler that accepts the state of torch's rendezvous and nothing else."""

    ALLOWED: ClassVar = {
        (dynamic_rendezvous.__name__, "_RendezvousState"),
        (dynamic_rendezvous.__name__, "_NodeDesc"),
        ("builtins", "set"),
        ("datetime", "datetime"),
        ("datetime", "timedelta"),
        ("datetime", "timezone"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a rendezvous")
        return super().find_class(module, name)


class _Pickle:
    """A replacement for :mod:`pickle` where torch reads the state from the store."""

    PickleError = pickle.PickleError
    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def loads(data: bytes) -> Any:
        return _Unpickler(io.BytesIO(data)).load()


def meet_warily() -> None:
    """Make torch's rendezvous listen at the master's address only, and run no pickle."""
    os.environ.pop(FILE, None)
    dynamic_rendezvous.pickle = _Pickle  # type: ignore[assignment]
    c10d_rendezvous_backend.TCPStore = tcp_store  # type: ignore[assignment, misc]
