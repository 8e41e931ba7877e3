"""Rename rules that work both ways: pairs of templates, with arithmetic where names do not do.

A template is a name with fields: ``{s}`` stage, ``{b}`` block, ``{n}`` 1, 2 or 3, ``{p}`` weight
or bias. ``{s+1}`` and ``{2s+1}`` stand for other implementations that count stages otherwise.
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
        ours, theirs: templates; all names of one side must be there for the rule to hold.
        read: tensors of ``theirs`` to those of ``ours``. write: the reverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Convert = list
    write: Convert = list


def renames(pairs: Mapping[str, str], ours: str = "", theirs: str = "") -> list[Rule]:
    """One rule per pair ``our template: their template``, each side behind its own prefix."""
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
    """The values of a template's fields in a name; None if the name is none of it."""
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
    """The name that a template stands for."""

    def value(field: re.Match[str]) -> str:
        if not (field["factor"] or field["offset"]):
            return str(values[field["field"]])
        number = int(field["factor"] or 1) * int(values[field["field"]])
        return str(number + int(field["offset"] or 0))

    return _FIELD.sub(value, template)


class Translated(NamedTuple):
    """New state, new name -> the old ones it was made from, and the old names no rule takes."""

    state: State
    sources: dict[str, tuple[str, ...]]
    left: list[str]


def translate(rules: Iterable[Rule], state: State, *, write: bool = False) -> Translated:
    """Apply to each name the first rule that holds: theirs to ours, or with ``write`` the reverse.

    Tensors are passed on, not copied, where a rule does no arithmetic.
    """
    rules = list(rules)
    out = Translated({}, {}, [])
    used: set[str] = set()  # a rule of several names takes them all at the first one
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
