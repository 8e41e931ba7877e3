"""Read a typed configuration from strict YAML with ``base:`` inheritance and dotted overrides.

Every mistake in a file or an override becomes a :class:`ConfigError`: one line that names the file
and line or the override, the value, the expected type and the nearest valid key.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..common import ranks
from ..common.text import plain
from . import yaml_core
from .architecture import Architecture
from .kinds import check_path
from .mixture import dense_by_mistake
from .recipes import find_config
from .renamed import RENAMED, present_name, rename
from .sections import Config
from .tasks import TASKS
from .variants import FAMILIES, VARIANTS
from .yaml_core import ConfigError, Key, NotOurYaml

log = logging.getLogger("swin_moe")

AnyArchitecture = TypeVar("AnyArchitecture", bound=Architecture)

KNOWN = {**FAMILIES, **VARIANTS}
_BASES = 32  # files that inherit from each other

Origins = dict[Key, str]  # dotted path -> "file:line" or "override"


def _error(place: str, problem: str) -> ConfigError:
    return ConfigError(_short(plain(f"{place}: {problem}" if place else problem), 1000))


def _short(text: str, length: int) -> str:
    """Cut the middle out of a text that is too long for a line."""
    half = length // 2 - 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _kind(key: Key) -> Any:
    """Return the type of a section or of a key's values; None if there is no such key."""
    kinds: list[Any] = [Config]
    for part in present_name(key):
        fields = [getattr(kind, "model_fields", {}).get(part) for kind in kinds]
        found = [field.annotation for field in fields if field is not None]
        if not found:
            return None
        # `task` is a union of sections.
        kinds = list(TASKS.values()) if key[:1] == ("task",) and part == "task" else found[:1]
    return kinds[0]


def _is_text(key: Key) -> bool:
    """Return whether a key takes text; an unknown key does."""
    return _kind(key) in (str, None)


def _read_file(path: Path, is_text: yaml_core.IsText | None) -> tuple[dict[str, Any], Origins]:
    name = plain(path)
    try:
        data, lines = yaml_core.read(path, is_text)
    except OSError as error:
        what = "config file" if is_text else "file"
        raise _error(name, f"cannot read the {what} ({error.strerror})") from None
    except NotOurYaml as error:
        raise _error(f"{name}:{error.line}", str(error)) from None
    except ValueError as error:
        raise _error("", str(error)) from None  # it names the file
    return data, {key: f"{name}:{line}" for key, line in lines.items()}


def _read_with_bases(path: Path) -> tuple[dict[str, Any], Origins]:
    """Read one file and its ``base:`` chain; the nearer file wins key by key."""
    quiet = written_by_a_run(path)
    raw, origins = _read_file(path, _is_text)
    _rename(raw, origins, quiet)
    seen = [os.path.realpath(path)]
    while (base := raw.pop("base", None)) is not None:
        place = origins.pop(("base",))
        try:
            path = path.parent / check_path(base, required=True)
            parent, parent_origins = _read_file(path, _is_text)
            _rename(parent, parent_origins, quiet)
        except ValueError as error:
            raise _error(place, f"base: {error}") from None
        seen.append(os.path.realpath(path))
        if seen[-1] in seen[:-1]:
            raise _error(place, f"{plain(path)}: base files form a circle")
        if len(seen) > _BASES:
            raise _error(place, f"more than {_BASES} base files")
        raw, origins = _merge(parent, raw), {**parent_origins, **origins}
    return raw, origins


def _rename(raw: dict[str, Any], origins: Origins, quiet: bool = False) -> None:
    """Give former keys their new names; rank 0 of each node logs a warning for each.

    Args:
        quiet: log nothing, because a run wrote the file.
    """
    if not isinstance(raw, dict):
        return
    try:
        for place, text in rename(raw, origins):
            if not quiet and ranks.environment_rank()[1] == 0:
                log.warning("%s", _short(plain(f"{place}: {text}" if place else text), 1000))
    except ValueError as error:
        raise _error("", str(error)) from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; a value that is not a mapping replaces the base's."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply_override(raw: dict[str, Any], origins: Origins, override: str) -> None:
    name, separator, text = override.partition("=")
    key = tuple(name.strip().split("."))
    place = f"override '{_short(override, 200)}'"
    if not separator or not all(key) or len(key) > 2 or not name.isprintable():
        raise _error(place, "expected section.key=value")
    try:
        value = _word(key, text)
    except ValueError as error:
        raise _error(place, str(error)) from None
    stated = {key[0]: value} if len(key) == 1 else {key[0]: {key[1]: value}}
    _rename(stated, {key: place})
    for section, content in stated.items():
        if (section,) == key:
            _state(raw, origins, key, content, place)
        else:
            for leaf in content:
                _state(raw, origins, (section, leaf), content[leaf], place)


def _state(raw: dict[str, Any], origins: Origins, key: Key, value: Any, place: str) -> None:
    """Set a key, or a whole section, in place."""
    section = raw
    for part in key[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise _error(place, f"'{part}' is not a section")
    section[key[-1]] = value
    for below in [other for other in origins if other[: len(key)] == key]:
        del origins[below]
    origins[key] = place


def _word(key: Key, text: str) -> Any:
    """Return the value of a word on the command line.

    The shell has removed its own quotes, and the rest is literal. Quotes around the whole word are
    removed. Otherwise a key that takes text gets the word unchanged. Other keys take the values of
    a file: numbers, true and false, [lists], {sections}.

    Raises:
        ValueError: the word cannot be parsed.
    """
    word = text.strip()
    if (inner := yaml_core.unquoted(word)) is not None:
        return inner
    if _is_text(key):
        return text
    if not word.startswith(("[", "{")):
        return yaml_core.scalar(word)
    if re.search(r"\s#", word):
        raise ValueError("# would begin a comment here: give each key of the section by itself")
    return yaml_core.parse(word, lambda inner: _is_text((*key, *inner)))[0]


def _valid_keys(section: Key) -> list[str]:
    """Return the dotted names of the keys of a section, or of the sections."""
    if not section:
        return list(Config.model_fields)
    kinds = TASKS.values() if section == ("task",) else [_kind(section)]
    fields = dict.fromkeys(name for kind in kinds for name in getattr(kind, "model_fields", ()))
    return [".".join((*section, name)) for name in fields]


def _all_keys() -> list[str]:
    return [leaf for section in Config.model_fields for leaf in _valid_keys((section,))]


def _suggest(key: Key) -> str:
    """Return the most likely key: of the same name, or similar in its section, or anywhere."""
    name = ".".join(key)
    if len(key) == 1 and name in _all_keys():
        section, _, leaf = name.partition(".")
        return f"in a file, write '{section}:' and below it '{leaf}:'"
    owners = [name for name, kind in TASKS.items() if key[1:2] and key[1] in kind.model_fields]
    if key[0] == "task" and owners:
        return f"only task.name={_or(owners)} has it"
    leaf = key[-1].lower().replace("-", "_")
    leaf = "base_lr" if leaf in ("lr", "learning_rate") else leaf
    same = [other for other in _all_keys() if _leaf(other) == leaf]
    former = difflib.get_close_matches(leaf, [old for _, old in RENAMED], n=1, cutoff=0.8)
    same += [".".join(new) for old, new in RENAMED.items() if old[1] in former]
    found = same or _near(leaf, _valid_keys(key[:-1])) or _near(leaf, _all_keys())
    if found:
        return f"did you mean '{found[0]}'?"
    valid = [_leaf(other) for other in _valid_keys(key[:-1])]
    return f"valid keys: {', '.join(valid)}"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _near(leaf: str, names: list[str]) -> list[str]:
    """Return the dotted names that contain ``leaf`` as whole words, otherwise the most similar."""
    parts = [name for name in names if f"_{leaf}_" in f"_{_leaf(name)}_"]
    close = difflib.get_close_matches(leaf, map(_leaf, names), n=1, cutoff=0.6)
    return parts or [name for name in names if _leaf(name) in close]


def _explain(error: ValidationError, origins: Origins, source: str) -> ConfigError:
    """Describe the first wrong key in one line."""
    errors = [_without_tag(each) for each in error.errors()]
    key = tuple(str(part) for part in errors[0]["loc"][:2])
    # A key may allow several types. The errors of the type that fits best are reported.
    same = [other for other in errors if other["loc"][: len(key)] == errors[0]["loc"][:2]]
    deepest = max(len(_indices(other)) for other in same)
    same = [other for other in same if len(_indices(other)) == deepest]
    same = [other for other in same if other["type"] in _BOUNDS] or same
    first = same[0]
    known = key
    while known and known not in origins:
        known = known[:-1]
    below = (place for other, place in origins.items() if other[: len(key)] == key)
    place = origins.get(known) or next(below, source)
    if first["type"] == "union_tag_invalid":
        place = origins.get(("task", "name"), place)
    name = ".".join(key) + "".join(f"[{index}]" for index in _indices(first))
    value = "null" if first["input"] is None else _short(repr(first["input"]), 60)
    if first["type"] == "extra_forbidden":
        message = f"unknown key '{name}': {_suggest(key)}"
    elif first["type"] == "union_tag_invalid":
        message = f"task.name={first['input']['name']!r:.60}: expected {_or(list(TASKS))}"
    elif first["type"] == "value_error":
        cause = str(first["ctx"]["error"])
        message = f"{name}: {cause}" if name else cause
    elif first["type"] in ("model_type", "model_attributes_type"):
        message = f"'{name}' is a section and needs keys below it, got {value}"
    else:
        wanted = " or ".join(dict.fromkeys(map(_expected, same)))
        message = f"{name}={value}: expected {wanted}{_hint(first)}"
    more = len({other["loc"][:2] for other in errors}) - 1
    return _error(place, message + (f" (and {more} more)" if more else ""))


def _without_tag(error: Any) -> Any:
    """Remove the name of the task from the place of an error."""
    place = error["loc"]
    return error | {"loc": place[:1] + place[2:]} if place[:1] == ("task",) else error


_BOUNDS = {
    "less_than", "less_than_equal", "greater_than", "greater_than_equal", "finite_number",
    "too_short", "too_long",
}  # fmt: skip


def _indices(error: Any) -> list[int]:
    """Return the place of an error within a key's value, without pydantic's names of types."""
    return [part for part in error["loc"][2:] if isinstance(part, int)]


def _expected(error: Any) -> str:
    if error["type"] == "too_short":
        return f"a list of at least {error['ctx']['min_length']}"
    if error["type"] == "too_long":
        return f"a list of at most {error['ctx']['max_length']}"
    message = str(error["msg"]).removeprefix("Input should be ")
    return message.removeprefix("a valid ").removeprefix("valid ")


def _or(names: list[str]) -> str:
    return " or ".join(map(repr, names))


def _hint(error: Any) -> str:
    """Return a correction of a value in the wrong form, otherwise ""."""
    value = error["input"]
    if error["type"] == "string_type":
        return (
            ": write '' for none, or quotes around a name"
            if value is None
            else ": put it in quotes"
        )
    if error["type"] == "bool_type":
        return ": write true or false"
    if isinstance(value, str) and error["type"] in ("int_type", "float_type"):
        is_number = re.fullmatch(r"[-+.]*[0-9][-+.0-9eE]*", value)
        return " without quotes" if is_number else ""
    return ""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file or a recipe, apply ``section.key=value`` overrides and validate.

    Args:
        path: a file, or the name of a recipe that comes with the package.

    Raises:
        ConfigError: one line that names the file and line (or the override), the key, its value,
            the expected type, and the nearest valid key.
    """
    path = find_config(path)
    raw, origins = _read_with_bases(path)
    for override in overrides:
        _apply_override(raw, origins, override)
    train = raw.setdefault("train", {})
    if isinstance(train, dict) and train.get("output") in (None, ""):
        train["output"] = f"runs/{path.stem}"
    saved = written_by_a_run(path)
    config = _validate(Config, raw, origins, str(path))
    refuse_dense(config, raw, origins, str(path), saved)
    if not saved:
        _check_rates(config, origins, str(path))
    return config


def written_by_a_run(path: Path) -> bool:
    """Return whether a config file is in a run directory or a checkpoint."""
    marks = (path.parent / "manifest.json", path.parent / ".swin_moe")
    return path.name == "config.yaml" and any(mark.is_file() for mark in marks)


def _check_rates(config: Config, origins: Origins, source: str) -> None:
    """Raise :class:`ConfigError` for a rate that would rise, which earlier versions allowed."""
    peak, lowest = config.optimizer.base_lr, config.schedule.min_lr
    if lowest > peak:
        keys = (("schedule", "min_lr"), ("optimizer", "base_lr"))
        places = [origins[key] for key in keys if key in origins] or [source]
        place = next((place for place in places if place.startswith("override")), places[0])
        raise _error(place, f"schedule.min_lr={lowest} is above optimizer.base_lr={peak}: lower it")


def parse_overrides(overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Parse ``section.key=value`` words into nested plain values, not yet validated."""
    raw: dict[str, Any] = {}
    for override in overrides:
        _apply_override(raw, {}, override)
    return raw


def validate(raw: dict[str, Any], origins: Origins | None = None, source: str = "config") -> Config:
    """Fill in the defaults of ``model.name`` and validate nested plain values."""
    raw, origins = copy.deepcopy(raw), dict(origins or {})
    _rename(raw, origins, quiet=True)
    config = _validate(Config, raw, origins, source)
    refuse_dense(config, raw, origins, source)
    return config


def validate_architecture(raw: dict[str, Any], source: str) -> Architecture:
    """Validate the sections ``model`` and ``moe`` alone, such as those in a file of weights."""
    raw = copy.deepcopy(raw)
    _rename(raw, {}, quiet=True)
    raw.pop("ops", None)
    return _validate(Architecture, raw, None, source)


def refuse_dense(
    config: Architecture, raw: dict[str, Any], origins: Origins, source: str, saved: bool = False
) -> None:
    """Raise :class:`ConfigError` for a mixture without MoE blocks, see :mod:`.mixture`."""
    if found := dense_by_mistake(config, raw, origins, saved):
        path, message = found
        raise _error(origins.get(path, origins.get(path[:1], source)), message)


def _validate(
    kind: type[AnyArchitecture], raw: dict[str, Any], origins: Origins | None, source: str
) -> AnyArchitecture:
    origins = origins or {}
    if not isinstance(raw, dict):
        raise _error(source, f"expected sections such as 'model:', got {raw!r:.60}")
    model = raw.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and name not in KNOWN:
        place = origins.get(("model", "name"), source)
        raise _error(place, f"model.name={unknown_model(name)}")
    known = KNOWN.get(name, {}) if isinstance(name, str) else {}
    if kind is Config:
        raw = _with_task(raw)
        known = _merge(known, _task_defaults(raw))
    try:
        config = kind.model_validate(_merge(known, raw))
    except ValidationError as error:
        raise _explain(error, origins, source) from None
    for section, keys in known.items():  # only keys that the user stated count as set
        getattr(config, section).model_fields_set.difference_update(
            keys.keys() - (raw.get(section) or {}).keys()
        )
    return config


def _with_task(raw: dict[str, Any]) -> dict[str, Any]:
    """Add the default name to the section ``task`` if it has none."""
    task = raw.get("task", {})
    return {**raw, "task": {"name": "classification", **task}} if isinstance(task, dict) else raw


def _task_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the chosen task's defaults for other sections."""
    task = raw["task"]
    name = task.get("name") if isinstance(task, dict) else None
    chosen = TASKS.get(name) if isinstance(name, str) else None
    return chosen.defaults if chosen else {}


def unknown_model(name: str) -> str:
    """Return the message for an unknown model name."""
    near = difflib.get_close_matches(name, KNOWN, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`swin-moe models` lists the names"
    return f"{name!r} is not a known model: {hint}"


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML that :func:`load_config` reads back."""
    return yaml_core.dump(config.model_dump(), default_flow_style=None)


def load_plain(path: Path) -> dict[str, Any]:
    """Read a YAML file that is not a config, such as a manifest, into plain values.

    Raises:
        ConfigError: it cannot be read, or is not a mapping.
    """
    return _read_file(path, None)[0]


def dump_plain(data: dict[str, Any]) -> str:
    return yaml_core.dump(data, width=100)
