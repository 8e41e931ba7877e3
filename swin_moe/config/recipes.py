"""The recipes that come with the package, by name, such as ``fashion_mnist/swin_moe_micro``."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..common import shipped
from ..common.text import plain
from .yaml_core import ConfigError


def recipe_files() -> dict[str, Path]:
    """Return the files by name; those that begin with ``_`` are only bases of others."""
    folder = shipped.recipes()
    paths = sorted(path for path in folder.rglob("*.yaml") if not path.name.startswith("_"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def find_config(config: str | Path) -> Path:
    """Return the file that CONFIG names.

    A file wins over a recipe. Both may be given without their ``.yaml``.

    Raises:
        ConfigError: there is neither; the line suggests names.
    """
    path = Path(config)
    for candidate in (path, Path(f"{path}.yaml")):
        if not _is_missing(candidate):
            return candidate
    if recipe := recipe_files().get(path.as_posix().removesuffix(".yaml")):
        return recipe
    raise ConfigError(f"{plain(path)}: no such config file or recipe: {suggest_recipes(path)}")


def suggest_recipes(name: str | Path) -> str:
    """Return the end of an error's line: the recipes with the most similar name, or a command."""
    leaf = Path(name).name.removesuffix(".yaml")
    leaves = {recipe: recipe.rpartition("/")[2] for recipe in recipe_files()}
    close = difflib.get_close_matches(leaf, leaves.values(), n=1)
    found = [recipe for recipe in leaves if leaves[recipe] in close]
    hint = f"did you mean {' or '.join(found)}? " if found else ""
    return f"{hint}`swin-moe recipes` lists them"


def _is_missing(path: Path) -> bool:
    """Whether there is no such file. Other errors are reported when the file is read."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False
