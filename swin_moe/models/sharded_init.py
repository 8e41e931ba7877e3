"""A model that is never whole in memory: its modules' weights are made and handed on in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

Fill = Callable[[str, nn.Parameter], None]
Take = Callable[[list[nn.Parameter]], None]


def build_in_parts(build: Callable[[], nn.Module], take: Take, fill: Fill) -> nn.Module:
    """Build a model from the same draws as whole, a module at a time.

    Args:
        build: makes the model without its initial weights; ``init_weights`` then draws them.
        fill: called with the name and each initialised parameter, to put something else in it.
        take: called with a module's own parameters after that; it is to free their memory.
    """
    with _discarding():
        built = build()
    names = {id(module): name for name, module in built.named_modules()}

    @contextmanager
    def made(module: nn.Module) -> Iterator[None]:
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            real = nn.Parameter(torch.empty_like(parameter, device="cpu"))
            module._parameters[name] = own[name] = real
        yield
        prefix = f"{names[id(module)]}." if names[id(module)] else ""
        for name, parameter in own.items():
            fill(prefix + name, parameter)
        take(list(own.values()))

    built.init_weights(made)  # type: ignore[operator]
    return built


@contextmanager
def _discarding() -> Iterator[None]:
    """Modules lose their weights as soon as they are part of another.

    Not built on the meta device: the layers' own constructors draw numbers, and what is drawn after
    them must be the same.
    """

    def discard(_parent: nn.Module, _name: str, child: nn.Module | None) -> None:
        for module in child.modules() if child is not None else ():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = nn.Parameter(empty)

    handle = register_module_module_registration_hook(discard)
    try:
        yield
    finally:
        handle.remove()
