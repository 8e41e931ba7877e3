"""Build a model that is never whole in memory: each module's weights are made and taken in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

Fill = Callable[[str, nn.Parameter], None]
Take = Callable[[list[nn.Parameter]], None]


def build_in_parts(build: Callable[[], nn.Module], take: Take, fill: Fill) -> nn.Module:
    """Build a model module by module, with the same random draws as a whole model.

    Args:
        build: builds the model without initial weights; ``init_weights`` then draws them.
        take: called with each module's own parameters, to free their memory.
        fill: called before ``take`` with the name and each initialised parameter, which it may
            overwrite.
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
    """Discard the weights of modules as soon as they are registered in another module.

    The meta device would not do: constructors of layers draw random numbers, which later draws
    depend on.
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
