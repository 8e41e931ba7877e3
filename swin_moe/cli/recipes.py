"""The command ``swin-moe recipes``: lists and copies the recipes that come with the package."""

from __future__ import annotations

import argparse
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..common import shipped
from ..common.text import plain
from ..config import load_plain
from ..config.recipes import recipe_files, suggest_recipes
from .shared import DONE, widen


def recipes_command(arguments: argparse.Namespace, console: Any) -> int:
    """List the recipes, or copy them."""
    if arguments.copy is not None:
        for path in copy(arguments.pattern, arguments.copy):
            print(plain(path))
        return DONE
    lines = listing(arguments.pattern)
    widen(console, max(map(len, lines)))
    for line in lines:
        console.print(line, no_wrap=True, overflow="ellipsis", highlight=False)
    return DONE


def matching(pattern: str) -> dict[str, Path]:
    """Return the files of the recipes whose name, with or without its folder, fits a pattern.

    Raises:
        ValueError: none does.
    """
    pattern = pattern.removesuffix(".yaml")
    files = recipe_files()
    found = {n: p for n, p in files.items() if fnmatch(n, pattern) or fnmatch(p.stem, pattern)}
    if not found:
        raise ValueError(f"{plain(pattern)}: no such recipe: {suggest_recipes(pattern)}")
    return found


def listing(pattern: str) -> list[str]:
    """Return a line for each recipe: its name, its model, its first sentence."""
    rows = []
    for name, path in matching(pattern).items():
        files = _with_bases(path)
        models = (load_plain(file).get("model", {}).get("name") for file in files)
        sentences = map(_first_sentence, files)
        rows.append((name, next(filter(None, models), ""), next(filter(None, sentences), "")))
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{name:{wide[0]}}  {model:{wide[1]}}  {about}" for name, model, about in rows]


def copy(pattern: str, folder: Path) -> list[Path]:
    """Copy recipes with their base files into a folder, and return the files that are there now.

    Raises:
        ValueError: a file is in the way; nothing was written.
    """
    source = shipped.recipes()
    files = sorted({file for path in matching(pattern).values() for file in _with_bases(path)})
    texts = {folder / file.relative_to(source): file.read_bytes() for file in files}
    for target, text in texts.items():
        if target.exists() and target.read_bytes() != text:
            raise ValueError(
                f"{plain(target)} exists and is not this recipe: copy to another folder, or move it"
            )
    for target, text in texts.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.write_bytes(text)
    return list(texts)


def _with_bases(path: Path) -> list[Path]:
    """Return a recipe's file and the files that it inherits from, the nearest first."""
    files = [path]
    while base := load_plain(files[-1]).get("base"):
        files.append((files[-1].parent / base).resolve())
    return files


def _first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file, without parentheses."""
    comment = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
    text = re.sub(r"\n?# ?", " ", comment[0] if comment else "")
    words = " ".join(re.sub(r"\([^)]*\)", "", text).split()).replace(" :", ":")
    return words.partition(". ")[0].rstrip(".")
