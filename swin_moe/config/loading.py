"""From strict YAML with ``base:`` inheritance and dotted overrides to a typed configuration.

Every mistake in a file or an override becomes a :class:`ConfigError`: one line that names the file
and line or the override, the value, what was expected and the nearest valid key.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ..variants import FAMILIES, VARIANTS
from .mixture import dense_by_mistake, written_by_a_run
from .sections import Architecture, Config

AnyArchitecture = TypeVar("AnyArchitecture", bound=Architecture)

KNOWN = {**FAMILIES, **VARIANTS}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a float (YAML 1.2) and refuses duplicate keys."""


_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))

Origins = dict[tuple[str, ...], str]  # dotted path -> "file:line" or "override"


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Origins]:
    """Read one file and its ``base:`` chain; the nearer file wins key by key."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files form a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_Loader)):
            raise ConfigError(f"{path}: YAML aliases (*name) are not used here; write it out")
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}: not valid YAML ({problem})") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:', got {data!r:.60}")
    origins: Origins = {}
    if root is not None:
        _collect_origins(root, path, (), origins)
    base = data.pop("base", None)
    if base is None:
        return data, origins
    if not isinstance(base, str):
        raise ConfigError(f"{origins[('base',)]}: base must be a file name, got {base!r}")
    parent, parent_origins = _read_yaml(path.parent / base, (*seen, path.resolve()))
    return _merge(parent, data), {**parent_origins, **origins}


def _collect_origins(node: yaml.Node, path: Path, prefix: tuple[str, ...], out: Origins) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, str(key_node.value))
            place = f"{path}:{key_node.start_mark.line + 1}"
            if key in out:
                raise ConfigError(f"{place}: '{'.'.join(key)}' stands twice in this file")
            out[key] = place
            _collect_origins(value_node, path, key, out)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; a value that is not a mapping replaces what it meets."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply_override(raw: dict[str, Any], origins: Origins, override: str) -> None:
    key, separator, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not separator or not all(path):
        raise ConfigError(f"override '{override}': expected section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': the value is not valid YAML") from None
    node = raw
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{part}' is not a section")
    node[path[-1]] = value
    origins[path] = f"override '{override}'"


def _valid_keys(location: tuple[str, ...]) -> list[str]:
    """Dotted names of the keys that may stand at ``location``."""
    model: Any = Config
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = field.annotation
    return [".".join((*location, name)) for name in getattr(model, "model_fields", ())]


def _all_keys() -> list[str]:
    return [leaf for section in Config.model_fields for leaf in _valid_keys((section,))]


def _suggest(path: tuple[str, ...]) -> str:
    """The nearest valid key, first beside the mistake, then anywhere."""
    name = ".".join(path)
    beside = difflib.get_close_matches(name, _valid_keys(path[:-1]), n=1, cutoff=0.6)
    same_leaf = [key for key in _all_keys() if key.rsplit(".", 1)[-1] == path[-1]]
    anywhere = difflib.get_close_matches(name, _all_keys(), n=1, cutoff=0.6)
    found = beside or same_leaf[:1] or anywhere
    if found:
        return f"did you mean '{found[0]}'?"
    valid = [key.rsplit(".", 1)[-1] for key in _valid_keys(path[:-1])]
    return f"valid keys: {', '.join(valid)}"


def _explain(error: ValidationError, origins: Origins, source: str) -> ConfigError:
    first = error.errors()[0]
    path = _key_of(first)
    known = path
    while known and known not in origins:
        known = known[:-1]
    place = origins.get(known, source)
    name = ".".join(path)
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    if first["type"] == "extra_forbidden":
        message = f"unknown key '{name}': {_suggest(path)}"
    elif first["type"] == "value_error":
        cause = str(first["ctx"]["error"])
        message = f"{name}: {cause}" if name else cause
    elif first["type"] == "model_type":
        message = f"'{name}' is a section and needs keys below it, got {value}"
    else:
        same = [other for other in error.errors() if _key_of(other) == path]
        message = f"{name}={value}: expected {' or '.join(dict.fromkeys(map(_expected, same)))}"
    more = len({_key_of(other) for other in error.errors()}) - 1
    return ConfigError(f"{place}: {message}" + (f" (and {more} more)" if more else ""))


def _key_of(error: Any) -> tuple[str, ...]:
    """Where an error is, without the names that pydantic gives to the members of a union."""
    return tuple(str(part) for part in error["loc"] if re.fullmatch(r"\w+", str(part)))


def _expected(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Input should be ")
    return message.removeprefix("a valid ").removeprefix("valid ")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides and validate.

    Raises:
        ConfigError: one line naming the file and line (or the override), the key, its value,
            what was expected, and the nearest valid key.
    """
    path = Path(path)
    raw, origins = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, origins, override)
    train = raw.setdefault("train", {})
    if isinstance(train, dict):
        train["output"] = train.get("output") or f"runs/{path.stem}"
    config = _validate(Config, raw, origins, str(path))
    refuse_dense(config, raw, origins, str(path), written_by_a_run(path))
    return config


def parse_overrides(overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``section.key=value`` words as nested plain values, not yet validated."""
    raw: dict[str, Any] = {}
    for override in overrides:
        _apply_override(raw, {}, override)
    return raw


def validate(raw: dict[str, Any], origins: Origins | None = None, source: str = "config") -> Config:
    """Fill in the variant that ``model.name`` names and validate nested plain values."""
    config = _validate(Config, raw, origins, source)
    refuse_dense(config, raw, origins or {}, source)
    return config


def validate_architecture(raw: dict[str, Any], source: str) -> Architecture:
    """The same for the sections ``model`` and ``moe`` alone, which weights may state, too."""
    return _validate(Architecture, raw, None, source)


def refuse_dense(
    config: Architecture, raw: dict[str, Any], origins: Origins, source: str, saved: bool = False
) -> None:
    """Raise :class:`ConfigError` for a mixture without MoE blocks, see :mod:`.mixture`."""
    if found := dense_by_mistake(config, raw, origins, saved):
        path, message = found
        raise ConfigError(f"{origins.get(path, origins.get(path[:1], source))}: {message}")


def _validate(
    kind: type[AnyArchitecture], raw: dict[str, Any], origins: Origins | None, source: str
) -> AnyArchitecture:
    origins = origins or {}
    model = raw.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and name not in KNOWN:
        place = origins.get(("model", "name"), source)
        raise ConfigError(f"{place}: model.name={unknown_model(name)}")
    known = KNOWN.get(name, {}) if isinstance(name, str) else {}
    try:
        config = kind.model_validate(_merge(known, raw))
    except ValidationError as error:
        raise _explain(error, origins, source) from None
    for section, keys in known.items():  # what is set is what the user stated, not the variant
        getattr(config, section).model_fields_set.difference_update(
            keys.keys() - (raw.get(section) or {}).keys()
        )
    return config


def unknown_model(name: str) -> str:
    """What to tell a person who asked for a model that there is not."""
    near = difflib.get_close_matches(name, KNOWN, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`swin-moe models` lists the names"
    return f"{name!r} is not a known model: {hint}"


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, default_flow_style=None)


def load_plain(path: Path) -> dict[str, Any]:
    """A YAML file that is no config of ours, such as a manifest, as plain values.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    data, _ = _read_yaml(path)
    return data


def dump_plain(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, width=100)
