"""Translation of state dicts between our names and other implementations', one file per dialect.

Nothing here reads files or builds models. The modules ``ours``, ``official``, ``timm``,
``huggingface``, ``torchvision`` and ``mmseg`` are tables of names.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...config import ModelConfig
from .base import Dialect, Images, Translation, check_sizes, read, write
from .huggingface import HUGGINGFACE, huggingface_config, huggingface_processor
from .mmseg import MMSEG
from .official import OFFICIAL
from .ours import OURS
from .rules import DialectError, State
from .timm import TIMM, timm_config
from .torchvision import TORCHVISION

_ALL = {d.name: d for d in (OURS, OFFICIAL, TIMM, HUGGINGFACE, TORCHVISION, MMSEG)}
DIALECTS: tuple[str, ...] = tuple(_ALL)

__all__ = [
    "DIALECTS",
    "DialectError",
    "Images",
    "State",
    "Translation",
    "computes_otherwise",
    "detect",
    "from_swin_moe",
    "huggingface_config",
    "huggingface_processor",
    "timm_config",
    "to_swin_moe",
]


def detect(names: Iterable[str]) -> str:
    """Return the dialect of a state dict; ``official`` for dense official files and ours.

    Raises:
        DialectError: none fits.
    """
    names = list(names)
    # Ours last: without experts, its names are official.
    for dialect in (HUGGINGFACE, MMSEG, TORCHVISION, TIMM, OFFICIAL, OURS):
        if dialect.recognises(names):
            return dialect.name
    known = ", ".join(f"{d.name} ({d.example})" for d in _ALL.values())
    found = f"the first of {len(names)} names is {names[0]!r}" if names else "it is empty"
    raise DialectError(f"no Swin state dict: {found}; names looked for: {known}")


def to_swin_moe(state: State, dialect: str) -> Translation:
    """Translate a state dict into our names; renamed tensors are shared with ``state``.

    Raises:
        DialectError: unknown dialect, names of another dialect or of none, or a tensor's shape
            does not fit its name.
    """
    spec = _dialect(dialect)
    if not spec.recognises(state):
        other = detect(state)
        raise DialectError(
            f"not {dialect} names: these look like {other} names; use --from {other} or auto"
        )
    return read(spec, state)


def from_swin_moe(state: State, dialect: str, model: ModelConfig) -> State:
    """Translate our state dict into another implementation's names, and add its buffers.

    Renamed tensors are shared with ``state``.

    Raises:
        DialectError: unknown dialect, a name that is not ours, or a model that the other
            implementation lacks or computes differently.
    """
    return write(_dialect(dialect), state, model)


def computes_otherwise(dialect: str, model: ModelConfig) -> str:
    """Return why the other implementation's outputs differ at the image size, or ``""``."""
    spec = _dialect(dialect)
    if model.family not in spec.windows:
        return ""
    try:
        check_sizes(spec, model)
    except DialectError as error:
        return str(error)
    return ""


def _dialect(name: str) -> Dialect:
    if name not in _ALL:
        raise DialectError(f"unknown dialect {name!r}: one of {', '.join(DIALECTS)}")
    return _ALL[name]
