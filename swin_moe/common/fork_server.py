"""A process that has imported everything and forks others: they start at once and share its pages.

``start`` forks it, before there are any threads. It listens at a Unix socket. Each connection
requests one program and receives its process number and exit code. A program gets the environment,
working folder and standard streams of its request, and a session of its own. It has no other open
files, and dies with the server, which dies with its starter.

Threads and a started CUDA driver do not survive a fork. If the imports start either, each program
replaces itself by a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import io
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO

# A launcher, a scheduler or a terminal sends these to all processes. They are for the programs; the
# server ends with its starter.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED of the CUDA driver
_LONGEST = 80  # bytes of a folder's name: a socket's may have 107
_NAME = 15  # characters that Linux keeps of a process's name
_PREFIX, _OWNER = "swin_moe-", "owner"  # a launcher's folder, and the file in it that it locks
_YOUNG = 60.0  # seconds
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only its user can enter; remove it in the end.

    If this process is killed, the server removes the folder. If the server is killed too, the next
    launcher removes it, since nobody holds its lock.

    Raises:
        OSError: the temporary folder is full or not writable.
    """
    # A job's own TMPDIR may be too long for a socket's name.
    place = Path(tempfile.gettempdir())
    place = place if len(os.fsencode(place)) < _LONGEST else Path("/tmp")
    remove_abandoned(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    with (folder / _OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(place: Path) -> None:
    """Remove this user's private folders in ``place`` whose launcher and server are gone."""
    for owner in place.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError):
            folder = owner.parent.lstat()
            young = time.time() - folder.st_mtime < _YOUNG  # perhaps it is not locked yet
            if folder.st_uid != os.geteuid() or not stat.S_ISDIR(folder.st_mode) or young:
                continue
            # Another user may have put a pipe or a link there.
            lock = os.open(owner, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)
            finally:
                os.close(lock)


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as the thread that forked it ends."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(128 + signal.SIGKILL)


class Server:
    """The starter's handle of a fork server, which ends with :meth:`close` or with its starter."""

    def __init__(self, path: Path, pid: int, lifeline: int) -> None:
        self.path, self._pid, self._lifeline = path, pid, lifeline

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)  # it may still import
            os.waitpid(self._pid, 0)
        os.close(self._lifeline)


def start(modules: Sequence[str], folder: Path) -> Server:
    """Fork a server that imports ``modules``; return without waiting for that.

    Args:
        folder: of :func:`private_folder`, for the server's socket.

    Raises:
        OSError: its socket or its process cannot be made.
    """
    path = folder / "fork"
    listener = listen(path)
    with listener:
        lifeline, ours = os.pipe()
        _flush()
        try:
            pid = os.fork()
        except OSError:
            os.close(lifeline)
            os.close(ours)
            raise
        if pid == 0:
            os.close(ours)
            serve(listener, lifeline, modules)
    os.close(lifeline)
    return Server(path, pid, ours)


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def serve(listener: socket.socket, lifeline: int, modules: Sequence[str]) -> NoReturn:
    """Import ``modules``, then fork the requested programs until ``lifeline`` is closed."""
    before: dict[int, Any] = {number: signal.signal(number, signal.SIG_IGN) for number in _IGNORED}
    # Otherwise torch starts the CUDA driver to look for GPUs.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    fit = True
    try:
        for module in modules:
            import_module(module)
    except Exception:  # the programs will report it
        fit = False
    fit = fit and len(os.listdir("/proc/self/task")) == 1 and not _cuda_started()
    gc.collect()
    gc.freeze()  # otherwise a collection in a program would write to all pages, and copy them
    try:
        _Loop(listener, lifeline, fit, before).run()
    except BaseException:
        traceback.print_exc()
    path = Path(listener.getsockname())
    with contextlib.suppress(OSError):
        path.unlink()
    if (path.parent / _OWNER).exists():  # its owner could not remove it
        shutil.rmtree(path.parent, ignore_errors=True)
    os._exit(0)  # its programs die with it


def _cuda_started() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED


class _Loop:
    """The server's loop: accept, fork, reap."""

    def __init__(
        self, listener: socket.socket, lifeline: int, fit: bool, before: dict[int, Any]
    ) -> None:
        self.listener, self.lifeline, self.fit, self.before = listener, lifeline, fit, before
        self.running: dict[int, socket.socket] = {}
        self.wake, self.woken = os.pipe()
        os.set_blocking(self.woken, False)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.woken, warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            for source in (self.listener, self.lifeline, self.wake):
                selector.register(source, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self.lifeline in ready:
                    for pid in self.running:
                        os.kill(pid, signal.SIGKILL)
                    return
                if self.wake in ready:
                    os.read(self.wake, 4096)
                self._reap()
                if self.listener in ready:
                    self._accept(selector)

    def _reap(self) -> None:
        for pid in list(self.running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with self.running.pop(pid) as connection, contextlib.suppress(OSError):
                    connection.sendall(b"exit %d\n" % os.waitstatus_to_exitcode(status))

    def _accept(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self.listener.accept()
        try:
            request, streams = _receive(connection)
        except (OSError, ValueError):
            connection.close()
            return
        try:
            pid = os.fork()
        except OSError:  # no room for another process: the closed connection shows it
            connection.close()
            for stream in streams:
                os.close(stream)
            return
        if pid == 0:
            self.listener.close()
            os.close(self.lifeline)
            selector.close()
            for other in self.running.values():
                other.close()
            self._become(request, streams, connection)
        for stream in streams:
            os.close(stream)
        self.running[pid] = connection

    def _become(
        self, request: dict[str, Any], streams: list[int], connection: socket.socket
    ) -> NoReturn:
        """Run a program in this process, which was just forked."""
        try:
            die_with_parent()
            signal.set_wakeup_fd(-1)
            for descriptor in (self.wake, self.woken):
                os.close(descriptor)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, handler in self.before.items():
                ignored = handler is signal.SIG_IGN
                usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, signal.SIG_IGN if ignored else usual)
            os.setsid()
            with connection:  # from here on, it obeys signals, alone or as a group
                connection.sendall(b"pid %d\n" % os.getpid())
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # files inherited from the launcher
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            module, arguments = request["module"], request["arguments"]
            if not self.fit:
                command = [sys.executable, "-u", "-m", module, *arguments]
                os.execve(command[0], command, os.environ)
            _settle(request["folder"], request["name"])
            _run(module, arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()


def _settle(folder: str, name: str) -> None:
    """Set what a fresh interpreter would have taken from its environment."""
    sys.path[0] = folder
    sys.stdout, sys.stderr = _unbuffered(sys.stdout, 1), _unbuffered(sys.stderr, 2)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name[:_NAME])
    if torch := sys.modules.get("torch"):
        threads = os.environ.get("OMP_NUM_THREADS", "")
        # In any case before autograd's threads start: after a fork they race for torch's pool.
        torch.set_num_threads(
            max(int(threads), 1) if threads.isdecimal() else torch.get_num_threads()
        )
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _unbuffered(stream: Any, descriptor: int) -> TextIO:
    """Return the stream as ``python -u`` opens it."""
    raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115 - lives on
    encoding = getattr(stream, "encoding", None) or "utf-8"
    errors = getattr(stream, "errors", None) or "backslashreplace"
    return io.TextIOWrapper(raw, encoding, errors, write_through=True)


def _run(module: str, arguments: list[str]) -> NoReturn:
    """Run ``python -m module arguments`` as the interpreter itself would."""
    sys.argv = [module, *arguments]
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()
    os._exit(code or 0)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            raise ValueError("half a request")
        data += more
    return json.loads(data), streams


class Child:
    """A program that a server runs, with the interface of :class:`subprocess.Popen`.

    Args:
        path: the server's socket.
        module: to run as ``python -m module``.
        arguments: of the command line.
        environment: all variables of the program.
        folder: its working folder, by default this process's.
        name: of the process in ``ps`` and ``top``.
        stdin: a file or descriptor, by default this process's own; so are ``stdout``, ``stderr``.

    Raises:
        OSError: the server is gone.
    """

    def __init__(
        self,
        path: Path,
        module: str,
        arguments: Sequence[str],
        *,
        environment: dict[str, str],
        folder: Path | None = None,
        name: str = "swin-moe",
        stdin: IO[Any] | int = 0,
        stdout: IO[Any] | int = 1,
        stderr: IO[Any] | int = 2,
    ) -> None:
        self.args = [module, *arguments]
        self.returncode: int | None = None
        self._received = b""
        request = {
            "module": module,
            "arguments": list(arguments),
            "environment": environment,
            "folder": str(folder or Path.cwd()),
            "name": name,
        }
        streams = [s if isinstance(s, int) else s.fileno() for s in (stdin, stdout, stderr)]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(path))
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [data], streams)
        if sent < len(data):
            self._connection.sendall(data[sent:])
        # The forked process sends this line itself.
        line = self._line(None)
        if line is None or not line.startswith(b"pid "):
            raise ConnectionError("the fork server has ended, or has no room for a process")
        self.pid = int(line.split()[1])

    def _line(self, timeout: float | None) -> bytes | None:
        """Return the server's next line; None after ``timeout`` seconds or without a server."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._received:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            self._connection.settimeout(left)
            try:
                more = self._connection.recv(64)
            except (BlockingIOError, TimeoutError):
                return None
            except ConnectionResetError:
                more = b""
            if not more:
                self._lost()
                return None
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _lost(self) -> None:
        """Kill the program: its server is gone, and nobody would see how it ends."""
        if self.returncode is None and hasattr(self, "pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.returncode = -signal.SIGKILL

    def poll(self) -> int | None:
        if self.returncode is None and (line := self._line(0.0)) is not None:
            self.returncode = int(line.split()[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and (line := self._line(timeout)) is not None:
            self.returncode = int(line.split()[1])
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # without a poll: a signal's handler may interrupt one
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
