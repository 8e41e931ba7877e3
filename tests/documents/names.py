"""Keys, files, modules, options and variables in backquotes, and Python blocks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from functools import cache

from swin_moe.tasks import Task

from . import EXCEPTIONS, ROOT, Document
from .commands import SECTIONS, options_of_commands, wrong_key

FOLDERS = ("swin_moe", "configs", "launch", "tests", "benchmarks", "docs", "requirements", "csrc")
CODE = (".py", ".h", ".cu", ".cuh", ".cpp", ".sh", ".sbatch")
OUTSIDE_OPTIONS = {  # of docker and the like, named by themselves
    "--gpus": "docker", "--shm-size": "docker", "--user": "docker", "--ipc": "docker",
    "--build-arg": "docker",
}  # fmt: skip


@cache
def known_options() -> set[str]:
    """All options of the program, its scripts, benchmarks and tests."""
    found = set(OUTSIDE_OPTIONS).union(*options_of_commands().values())
    for folder, pattern in (("launch", "*"), ("benchmarks", "**/*.*"), ("tests", "conftest.py")):
        for file in (ROOT / folder).glob(pattern):
            if file.suffix in (".py", ".sh", ".sbatch"):
                found |= set(re.findall(r"--[a-z][a-z-]+", file.read_text()))
        if folder == "launch":
            for file in (ROOT / folder).iterdir():
                words = re.findall(r'^options "([^"]*)"', file.read_text(), re.MULTILINE)
                found |= {f"--{word}" for word in " ".join(words).split()}
    return found


@cache
def files() -> list[str]:
    """Paths of the repository's sources, from its root."""
    return [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    ]


def wrong_names(document: Document) -> list[str]:
    """Keys, files, modules, options and variables in backquotes that are not there."""
    problems = []
    for code in document.inline:
        if code not in EXCEPTIONS:
            problems += _wrong_name(code)
    problems += [f"no key {word}" for word in _keys_of_tables(document) if wrong_key(word)]
    sources = _sources()
    for name in set(re.findall(r"\bSWIN_MOE_[A-Z_]+", document.prose + "".join(document.commands))):
        problems += [] if name in sources else [f"no variable {name}"]
    return problems


def _wrong_name(code: str) -> list[str]:
    section = rf"({'|'.join(SECTIONS)})\."
    if match := re.fullmatch(r"task\.(\w+)", code):
        return [] if hasattr(Task, match[1]) else wrong_key(code)  # a method, or a key
    if re.fullmatch(rf"{section}(\w+|\*)(: .*|=\S*)?", code) and not code.endswith(".py"):
        return wrong_key(code)
    if match := re.fullmatch(r"(.*)\{([\w,]+)\}(.*)", code):
        parts = [f"{match[1]}{part}{match[3]}" for part in match[2].split(",")]
        return [problem for part in parts for problem in _wrong_file(part)]
    if match := re.match(r"swin_moe(\.\w+)+", code):
        return wrong_reference(match[0])
    if code.startswith("--"):
        return [
            f"no option {w}"
            for w in code.split()
            if w.startswith("--") and w.split("=")[0] not in known_options()
        ]
    if re.fullmatch(rf"({section}\w+=\S+ ?)+", code):
        return [p for word in code.split() for p in wrong_key(word)]
    return _wrong_file(code)


def _wrong_file(code: str) -> list[str]:
    """A file of the repository that is not there, or one of a run that the sources do not name."""
    if not re.fullmatch(r"[\w./*-]+", code):
        return []
    name = code.rpartition("/")[2]
    if name.endswith((".png", ".jsonl", ".json")) and code.partition("/")[0] not in FOLDERS:
        words = re.findall(r"[A-Za-z_]+", name)  # a program may join them
        return [] if all(word in _sources() for word in words) else [f"no file {code}"]
    in_repository = code.split("/")[0] in FOLDERS and "/" in code
    if not in_repository and not code.endswith(CODE):
        return []
    if code.rstrip("/") in FOLDERS:
        return []
    pattern = re.escape(code.rstrip("/")).replace(r"\*", "[^/]*")
    whole = re.compile(rf"(.*/)?{pattern}")
    return [] if any(whole.fullmatch(file) for file in files()) else [f"no file {code}"]


def wrong_reference(name: str) -> list[str]:
    """A dotted name of the package that cannot be imported."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        try:
            for part in parts[end:]:
                value = getattr(value, part)
        except AttributeError:
            break
        return []
    return [f"no {name}"]


def _keys_of_tables(document: Document) -> list[str]:
    """The first cells of tables whose head is "key of `section`", as keys."""
    keys = []
    section = ""
    for line in document.prose.splitlines():
        first = line.split("|")[1] if line.startswith("|") else ""
        if match := re.search(r"key of `(\w+)`", first):
            section = match[1]
        elif not first:
            section = ""
        elif section:
            keys += [f"{section}.{code}" for code in re.findall(r"`([^`]+)`", first)]
    return keys


@cache
def _sources() -> str:
    paths = [ROOT / "setup.py", *(ROOT / "swin_moe").rglob("*.py"), ROOT / "tests/grid.py"]
    paths += [*(ROOT / "launch").iterdir(), *(ROOT / "benchmarks").rglob("*.[ps][yh]")]
    paths += (ROOT / "swin_moe/csrc").rglob("*.*")
    return "".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())


# Python


def wrong_python(source: str) -> list[str]:
    """Syntax, imports, attributes of the package and arguments of its functions."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if importlib.util.find_spec(node.module.partition(".")[0]) is None:
                continue  # an optional package
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            problems += [p for name in names for p in wrong_reference(name)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("swin_moe."):
            problems += wrong_reference(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("swin_moe."):
            problems += _wrong_arguments(node)
    return problems


def _wrong_arguments(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    if wrong_reference(name):
        return []  # reported already
    module, _, function = name.rpartition(".")
    called = getattr(importlib.import_module(module), function)
    try:
        inspect.signature(called).bind(
            *call.args, **{k.arg: k.value for k in call.keywords if k.arg}
        )
    except TypeError as error:
        return [f"{name}: {error}"]
    return []
