"""The fork server of a test session: one process imports everything, all tests fork from it."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from swin_moe import fork_server

SOCKET = "SWIN_MOE_TESTS_FORK"  # environment variable: where the server listens
MODULES = (
    "swin_moe.elastic", "swin_moe.run", "swin_moe.opened", "swin_moe.inspection",
    "swin_moe.data.show", "sympy", "matplotlib.pyplot", "torch.utils.tensorboard",
)  # fmt: skip
_SERVE = (
    "import os, sys; from pathlib import Path; from swin_moe import fork_server as f; "
    "lifeline = os.open(sys.argv[2], os.O_RDONLY); "
    "f.serve(f.listen(Path(sys.argv[1])), lifeline, sys.argv[3:])"
)


def begin() -> None:
    """Make the place of this session's server, which lives at most as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="swin_moe-tests-"))
    os.environ[SOCKET] = str(folder / "fork")
    os.mkfifo(folder / "lifeline")
    os.open(folder / "lifeline", os.O_RDWR)  # closed by the end of this process
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _ready(env: dict[str, str]) -> Path:
    """The socket of the server; whoever needs it first starts it."""
    path = Path(os.environ[SOCKET])
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            words = [sys.executable, "-c", _SERVE, path, path.parent / "lifeline", *MODULES]
            subprocess.Popen(words, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
            deadline = time.monotonic() + 120
            while not path.exists():
                assert time.monotonic() < deadline, "the fork server of the tests does not start"
                time.sleep(0.02)
    return path


def child(
    words: list[str], env: dict[str, str], folder: Path, output: IO, errors: IO
) -> fork_server.Child:
    """Fork ``python -m words``."""
    with open(os.devnull) as nothing:
        return fork_server.Child(
            _ready(env), words[0], words[1:], environment=env, folder=folder,
            stdin=nothing, stdout=output, stderr=errors,
        )  # fmt: skip
