"""Packages whose ``__init__`` runs only when it is needed.

We need a few files of timm and one folder of torchvision, and torch asks ``torch._dynamo`` to leave
its optimizers alone. Each of these packages first imports thousands of files: seconds of a start.
A deferred package imports the parts named here without its ``__init__``. It runs its ``__init__``
at the first access to anything else, so that ``timm.create_model``,
``from torchvision.ops import nms`` and ``torch.compile`` work as usual.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

# Package to the submodules that it imports without its `__init__`. None may have the name of
# something else that the `__init__` defines.
PARTS: dict[str, tuple[str, ...]] = {
    "torchvision": ("transforms", "utils"),
    "timm": ("data", "layers", "loss", "scheduler"),
    "timm.data": (
        "auto_augment",
        "constants",
        "mixup",
        "naflex_transforms",
        "random_erasing",
        "transforms",
        "transforms_factory",
    ),
    "timm.layers": ("drop",),
    "torch._dynamo": ("config",),
}
_lock = threading.RLock()
_running: set[str] = set()  # packages whose `__init__` runs now, in the thread that has the lock
_undisabled: list[Any] = []  # functions to disable once dynamo is imported


class _Deferred(ModuleType):
    """A package before its ``__init__`` has run."""

    def __getattr__(self, name: str) -> Any:
        if name in PARTS[self.__name__]:
            return import_module(f"{self.__name__}.{name}")
        if name == "__file__":  # the import system reads it
            raise AttributeError(name)
        with _lock:  # another thread may be running it
            if self.__name__ in _running:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            _run_init(self)
        return getattr(self, name)


class _Later(Loader):
    """A loader of deferred packages, around the loader that runs the ``__init__`` later."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # the default module

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Deferred
        if module.__name__ == "torch._dynamo":
            module.__dict__.update(_EAGER)


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """Stand in for ``torch._dynamo.disable`` while nothing is compiled and nothing to disable.

    torch's own functions call this each time and keep its result (``torch/_compile.py``) until
    dynamo is imported. Other functions are disabled by the first call after that.
    """
    dynamo = sys.modules["torch._dynamo"]
    if not isinstance(function, FunctionType):
        with _lock:
            _run_init(dynamo)
        return dynamo.disable(function, recursive, **options)
    if options == {"wrapping": False}:
        _undisabled.append(function)
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if type(dynamo) is _Deferred:
            return function(*args, **kwargs)
        return dynamo.disable(function, recursive, **options)(*args, **kwargs)

    return call


def _graph_break(message: str = "") -> None:
    """Stand in for ``torch._dynamo.graph_break`` where there is no graph."""


# The functions of dynamo that torch's optimizers and meta tensors call in eager mode.
_EAGER = {"disable": _disable, "graph_break": _graph_break}


def _run_init(package: ModuleType) -> None:
    """Run the ``__init__`` of a package once; call it with ``_lock`` held."""
    # The parent's first, as in every import; it may run this one.
    parent = sys.modules.get(package.__name__.rpartition(".")[0])
    if type(parent) is _Deferred:
        _run_init(parent)
    if type(package) is not _Deferred or package.__name__ in _running:
        return
    spec = package.__spec__
    assert spec is not None
    assert isinstance(spec.loader, _Later)
    later, loader = spec.loader, spec.loader.loader
    _running.add(package.__name__)
    if package.__name__ == "torch._dynamo":
        for name in _EAGER:
            package.__dict__.pop(name, None)
        for function in _undisabled:
            function.__dict__.pop("__dynamo_disable", None)
    package.__loader__ = spec.loader = loader
    try:
        loader.exec_module(package)
        package.__class__ = ModuleType  # type: ignore[assignment]
    except BaseException:  # keep it deferred, for another try
        package.__loader__ = spec.loader = later
        raise
    finally:
        _running.discard(package.__name__)


class _Loaded(Loader):
    """A loader of a module that its package's ``__init__`` has imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    """A finder that defers packages, and runs their ``__init__`` before any other submodule."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in PARTS:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _Later(spec.loader)
            return spec
        parent, _, child = name.rpartition(".")
        package = sys.modules.get(parent)
        if type(package) is not _Deferred or child in PARTS[parent]:
            return None
        # Waiting could deadlock: the other thread may wait for the module that this one imports.
        if not _lock.acquire(blocking=False):
            return None
        try:
            _run_init(package)
        finally:
            _lock.release()
        module = sys.modules.get(name)
        return ModuleSpec(name, _Loaded(module)) if module is not None else None


def import_uncompiled(module: str) -> None:
    """Import a module that decorates functions with ``torch.compile``; they compile at first use.

    The decorator would import the compiler. A module that does not exist is skipped.
    """
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = functools.cache(lambda: compile_now(function))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        with contextlib.suppress(ModuleNotFoundError):
            import_module(module)
    finally:
        torch.compile = compile_now


def exports(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` that imports each of its names on first use.

    Args:
        homes: name to the module of the package that defines the name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        # The import has bound the module itself, which may have the same name.
        setattr(sys.modules[package], name, value)
        return value

    return get


def defer_packages() -> None:
    """Defer the packages of ``PARTS`` that are not imported yet."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
