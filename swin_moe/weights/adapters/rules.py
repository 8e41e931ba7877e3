"""Rename rules that work both ways: pairs of templates, with arithmetic where it is needed.

A template is a name with fields: ``{s}`` stage, ``{b}`` block, ``{n}`` 1, 2 or 3, ``{p}`` weight
or bias. ``{s+1}`` and ``{2s+1}`` are for implementations that count stages differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor

State = dict[str, Tensor]
Convert = Callable[[list[Tensor]], list[Tensor]]

_FIELD = re.compile(r"\{(?P<factor>\d?)(?P<field>[sbnp])(?:\+(?P<offset>\d))?\}")
_VALUES = {"s": r"\d+", "b": r"\d+", "n": "[123]", "p": "weight|bias"}


class DialectError(ValueError):
    """A state dict or a target that cannot be translated; the message is one line for the user."""


class Rule(NamedTuple):
    """Tensors of ours that are made of tensors of theirs, and back.

    Attributes:
        ours: templates, of which all names must be present to write.
        theirs: templates, of which all names must be present to read.
        read: from the tensors of ``theirs`` to those of ``ours``.
        write: the reverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Convert = list
    write: Convert = list


def renames(pairs: Mapping[str, str], ours: str = "", theirs: str = "") -> list[Rule]:
    """Return one rule per pair ``our template: their template``, each with its side's prefix."""
    return [Rule((ours + o,), (theirs + t,)) for o, t in pairs.items()]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern, end = "", 0
    for field in _FIELD.finditer(template):
        value = f"(?P<{field['field']}>{_VALUES[field['field']]})"
        pattern += re.escape(template[end : field.start()]) + value
        end = field.end()
    return re.compile(pattern + re.escape(template[end:]))


def match(template: str, name: str) -> dict[str, str] | None:
    """Return the values of a template's fields in a name; None if it does not match."""
    found = _pattern(template).fullmatch(name)
    if found is None:
        return None
    values = found.groupdict()
    for field in _FIELD.finditer(template):
        if field["factor"] or field["offset"]:
            number = int(values[field["field"]]) - int(field["offset"] or 0)
            number, rest = divmod(number, int(field["factor"] or 1))
            if rest or number < 0:
                return None
            values[field["field"]] = str(number)
    return values


def fill(template: str, values: Mapping[str, str | int]) -> str:
    """Return the name of a template with these values."""

    def value(field: re.Match[str]) -> str:
        if not (field["factor"] or field["offset"]):
            return str(values[field["field"]])
        number = int(field["factor"] or 1) * int(values[field["field"]])
        return str(number + int(field["offset"] or 0))

    return _FIELD.sub(value, template)


class Translated(NamedTuple):
    """A new state, each new name's old names, and the old names without a rule."""

    state: State
    sources: dict[str, tuple[str, ...]]
    left: list[str]


def translate(rules: Iterable[Rule], state: State, *, write: bool = False) -> Translated:
    """Apply to each name the first matching rule: theirs to ours, or with ``write`` the reverse.

    Tensors are not copied if a rule does no arithmetic.
    """
    rules = list(rules)
    out = Translated({}, {}, [])
    used: set[str] = set()  # a rule of several names uses all of them at the first one
    for name in state:
        for rule in rules:
            old, new = (rule.ours, rule.theirs) if write else (rule.theirs, rule.ours)
            values = next((v for t in old if (v := match(t, name)) is not None), None)
            if values is None:
                continue
            names, made = ([fill(t, values) for t in side] for side in (old, new))
            if any(n in used or n not in state for n in names) or out.state.keys() & set(made):
                continue
            tensors = _convert(rule.write if write else rule.read, names, state)
            out.state.update(zip(made, tensors, strict=True))
            out.sources.update(dict.fromkeys(made, tuple(names)))
            used.update(names)
            break
    out.left.extend(name for name in state if name not in used)
    return out


def _convert(convert: Convert, names: list[str], state: State) -> list[Tensor]:
    try:
        return convert([state[name] for name in names])
    except (RuntimeError, IndexError):
        shapes = " ".join(str(tuple(state[name].shape)) for name in names)
        raise DialectError(f"{', '.join(names)}: shape {shapes} does not fit its name") from None
