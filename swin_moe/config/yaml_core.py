"""A subset of YAML 1.2: the core schema without tags and aliases, of bounded size and depth.

It serves for configs, overrides, the configs of checkpoints, and manifests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ..common.reading import DEPTH, read_text

LIMIT = 1 << 18  # bytes of a file; configs have some thousands

Key = tuple[str, ...]
IsText = Callable[[Key], bool]
"""Returns whether a key takes text literally, such as ``no`` and ``1e-3``."""

_NULL = ("~", "null", "Null", "NULL")
_WORDS: dict[str, bool | None] = dict.fromkeys(["", *_NULL])
_WORDS |= dict.fromkeys(["true", "True", "TRUE"], True)
_WORDS |= dict.fromkeys(["false", "False", "FALSE"], False)
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Octal in YAML 1.1, decimal in 1.2.
_ZERO_LED = re.compile(r"[-+]?0[0-9]+")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class NotOurYaml(ValueError):
    """A text outside this subset of YAML; ``line`` is counted from 1."""

    def __init__(self, problem: str, line: int = 1) -> None:
        super().__init__(problem)
        self.line = line


def scalar(text: str) -> bool | int | float | str | None:
    """Return the value of a word without quotes.

    Raises:
        ValueError: its meanings in YAML 1.1, which other programs read, and YAML 1.2 differ.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > 1000:  # Python itself refuses numbers of some thousand digits
            raise ValueError(f"a number of {len(text):,} digits is not read")
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    older = yaml.SafeLoader.yaml_implicit_resolvers.get(text[0], ())
    if _ZERO_LED.fullmatch(text) or any(pattern.match(text) for _, pattern in older):
        raise ValueError(f"{text} has several meanings in YAML: {_instead(text)}")
    return text


def _instead(text: str) -> str:
    """Return a correction of a word with several meanings."""
    switch = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(text.lower())
    number = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text.replace("_", ""))
    is_number = _INTEGER.fullmatch(number) or _FLOAT.fullmatch(number)
    return f"write {switch or (number if is_number else 'a plain number')}"


def parse(text: str, is_text: IsText | None = None) -> tuple[Any, dict[Key, int]]:
    """Return the value of a YAML text, and the lines of its keys.

    Raises:
        NotOurYaml: it is not YAML, or not of this subset.
    """
    try:
        builder = _Builder(text, is_text)
        return builder.document(), builder.lines
    except NotOurYaml:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotOurYaml(f"the character {chr(error.character)!r} is not allowed", line) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise NotOurYaml(f"not valid YAML ({problem})", mark.line + 1 if mark else 1) from None
    except (ValueError, OverflowError):  # bad numbers in escapes and directives
        raise NotOurYaml("not valid YAML (an escape or a directive cannot be read)") from None


class _Builder:
    """A builder of values from the parser's events, one by one, which bounds the depth."""

    def __init__(self, text: str, is_text: IsText | None) -> None:
        self.lines: dict[Key, int] = {}
        self._is_text = is_text
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self) -> Any:
        next(self._events)  # the stream begins
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), (), 0)
        next(self._events)  # the document ends
        if not isinstance(event := next(self._events), yaml.StreamEndEvent):
            raise _wrong(event, "a second document begins (---); one is read")
        return value

    def _value(self, event: yaml.Event, key: Key, depth: int) -> Any:
        self._check(event)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, key)
        if depth == DEPTH:
            raise _wrong(event, f"nested deeper than {DEPTH} levels")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(key, depth)
        values = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, key, depth + 1))
        return values

    def _mapping(self, key: Key, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            self._check(event)
            name = event.value if isinstance(event, yaml.ScalarEvent) else ""
            if not name or not name.isprintable():
                raise _wrong(event, "a key must be a word")
            inner = (*key, name)
            if name in values:
                raise _wrong(event, f"'{'.'.join(inner)}' stands twice in this file")
            self.lines.setdefault(inner, _line(event))
            values[name] = self._value(next(self._events), inner, depth + 1)
        return values

    def _scalar(self, event: yaml.ScalarEvent, key: Key) -> Any:
        text: str = event.value
        if event.style or (self._is_text and self._is_text(key) and text not in _NULL):
            return text
        try:
            return scalar(text)
        except ValueError as error:
            quotes = "" if self._is_text else ", or put it in quotes"
            raise _wrong(event, f"{'.'.join(key)}: {error}{quotes}") from None

    @staticmethod
    def _check(event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise _wrong(event, "YAML aliases (*name) are not used here; write it out")
        if tag := getattr(event, "tag", None):
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise _wrong(event, f"not valid YAML here (tags such as {tag} are not used)")


def _wrong(event: yaml.Event, problem: str) -> NotOurYaml:
    return NotOurYaml(problem, _line(event))


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def unquoted(text: str) -> str | None:
    """Return the text in a word's quotes, by YAML's rules; None if it is not a quoted word.

    Raises:
        NotOurYaml: it has an escape that is not YAML's.
    """
    if re.fullmatch(r"'(?:[^']|'')*'", text):
        return text[1:-1].replace("''", "'")
    if not re.fullmatch(r'"(?:[^"\\]|\\.)*"', text, re.DOTALL):
        return None
    return str(parse(text)[0]) if "\\" in text else text[1:-1]


def read(path: Path, is_text: IsText | None = None) -> tuple[dict[str, Any], dict[Key, int]]:
    """Return the mapping in a file, and the lines of its keys.

    Raises:
        NotOurYaml: see :func:`parse`, or the text is not a mapping.
        ValueError: it is not a regular file, is too large, or is not text.
        OSError: it cannot be read.
    """
    data, lines = parse(read_text(path, LIMIT), is_text)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise NotOurYaml(f"expected sections such as 'model:', got {data!r:.60}")
    return data, lines


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes each word with another meaning in YAML 1.1 or 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (_INTEGER, _FLOAT, _ZERO_LED):
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _Dumper.add_implicit_resolver("tag:swin_moe,2026:number", _whole, list("-+.0123456789"))


def dump(data: dict[str, Any], width: int = 80, default_flow_style: bool | None = False) -> str:
    """Return plain values as YAML that :func:`parse` reads back equal."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, width=width, default_flow_style=default_flow_style
    )
