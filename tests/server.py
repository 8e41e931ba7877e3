"""The fork server of a test session: one process imports everything, all tests fork from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from swin_moe.common import fork_server

SOCKET = "SWIN_MOE_TESTS_FORK"  # environment variable: the server's socket
MODULES = (
    "swin_moe.launch.elastic", "swin_moe.train", "swin_moe.evaluate", "swin_moe.inspection",
    "swin_moe.reporting.contact_sheet", "sympy", "matplotlib.pyplot", "torch.utils.tensorboard",
)  # fmt: skip
_SERVE = (
    "import sys; from pathlib import Path; from swin_moe.common import fork_server as f; "
    "f.serve(f.listen(Path(sys.argv[1])), 0, sys.argv[2:])"
)


def begin(env: dict[str, str]) -> subprocess.Popen:
    """Start the server of this session; it ends with this process at the latest."""
    folder = Path(tempfile.mkdtemp(prefix="swin_moe-tests-", dir="/tmp"))
    os.environ[SOCKET] = str(folder / "fork")
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE, os.environ[SOCKET], *MODULES],
        stdin=subprocess.PIPE, env=env, start_new_session=True,
    )  # fmt: skip


def end(server: subprocess.Popen) -> None:
    """Kill the server and wait for it, so that ``time make test`` counts its time."""
    server.kill()
    server.wait()
    shutil.rmtree(Path(os.environ[SOCKET]).parent, ignore_errors=True)


def child(
    words: list[str], env: dict[str, str], folder: Path, output: IO, errors: IO
) -> fork_server.Child:
    """Fork ``python -m words``."""
    path = Path(os.environ[SOCKET])
    deadline = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < deadline, "the fork server of the tests does not start"
        time.sleep(0.02)
    with open(os.devnull) as nothing:
        return fork_server.Child(
            path, words[0], words[1:], environment=env, folder=folder,
            stdin=nothing, stdout=output, stderr=errors,
        )  # fmt: skip
