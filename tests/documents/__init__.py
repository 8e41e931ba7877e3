"""What the documentation names, checked against the repository: the helpers of test_docs.py.

A document is read into links, commands, inline code and Python blocks. Each check returns a list of
problems, one line each. The conventions of the documents:

- A fenced block without a language holds commands. If a line begins with ``$ ``, only such lines
  do. Output is in a block of the language ``text``.
- ``[--option VALUE]`` may be left out, ``a|b`` is each of a and b, and ``…`` is more words.
- Words in capitals stand for what a reader fills in.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Text in backquotes that looks like a key, a file or a command, and is none.
EXCEPTIONS = {"data.png", "train.json", "train.zip", "swin-moe r0", "swin-moe r1"}


class Document(NamedTuple):
    """A Markdown file in parts; ``commands`` and ``inline`` are lines of code."""

    path: Path
    prose: str  # without fenced blocks
    commands: list[str]
    python: list[str]
    inline: list[str]


def read(path: Path, text: str | None = None) -> Document:
    """Read a document; ``text`` instead of the file's."""
    text = path.read_text(encoding="utf-8") if text is None else text
    commands: list[str] = []
    python: list[str] = []

    def block(match: re.Match[str]) -> str:
        language, body = match[2].strip(), inspect.cleandoc("\n" + match[3])
        if language == "python":
            python.append(body)
        elif language in ("", "sh", "bash"):
            commands.extend(_lines(body))
        elif language not in ("text", "yaml"):
            commands.append(f"unknown language of a block: {language}")
        return "\n"

    prose = re.sub(r"^( *)```(.*)\n((?:.*\n)*?) *```$", block, text, flags=re.MULTILINE)
    inline = [
        " ".join(m[2].replace("\\|", "|").split())
        for m in re.finditer(r"(`+)(.+?)\1", prose, re.DOTALL)
    ]
    return Document(path, prose, commands, python, inline)


def _lines(body: str) -> list[str]:
    """The commands of a block, with continued lines joined."""
    lines = re.sub(r"\\\n", " ", body).splitlines()
    shown = [line[2:] for line in lines if line.startswith("$ ")]
    return shown or [line for line in lines if line.strip() and not line.startswith("#")]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def _anchors(prose: str) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


def broken_links(document: Document) -> list[str]:
    """Links to files and headings that are not there; other sites are not asked."""
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.prose):
        if target.startswith(("http://", "https://")):
            continue
        file, _, part = target.partition("#")
        path = document.path.parent / file
        if not path.exists():
            problems.append(f"link to {target}: no such file")
        elif part and part not in _anchors(read(path).prose if file else document.prose):
            problems.append(f"link to {target}: no such heading")
    return problems
