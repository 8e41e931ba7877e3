"""Commands of documents: subcommands, options, configs, keys, make targets, modules, scripts."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError

from swin_moe.cli.parser import build_parser, parse
from swin_moe.config import Config, ConfigError, load_config, parse_overrides
from swin_moe.config.renamed import RENAMED

from . import EXCEPTIONS, ROOT, Document

# The types of each key; the section of a task has those of all tasks.
SECTIONS: dict[str, dict[str, list[Any]]] = {
    name: {
        key: [
            Annotated[(f.annotation, *f.metadata)] if f.metadata else f.annotation
            for model in get_args(field.annotation) or (field.annotation,)
            if (f := model.model_fields.get(key))
        ]
        for part in get_args(field.annotation) or (field.annotation,)
        for key in part.model_fields
    }
    for name, field in Config.model_fields.items()
}
FORMER = {".".join(key) for key in RENAMED} | {"moe.backend=reference"}
# Programs of others, and why their commands are not checked. Ours inside them are.
OUTSIDE = {
    "docker": "needs a container engine",
    "apt": "installs packages of the system",
    "pip": "installs packages",
    ".venv/bin/pip": "installs packages",
    ".venv/bin/pre-commit": "writes to .git/hooks",
    "sbatch": "needs Slurm",
    "squeue": "needs Slurm",
    "mkdir": "of the shell",
    "cat": "of the shell",
    "tensorboard": "serves until it is stopped",
}
NUMBERS = {"N", "M", "P", "SHARE", "PIXELS", "SECONDS", "MB"}  # placeholders


def commands_of(document: Document) -> list[str]:
    """Those of blocks, and those in backquotes."""
    programs = ("swin-moe", "make", "python", "pytest", "torchrun", *OUTSIDE)
    inline = [
        code
        for code in document.inline
        if code not in EXCEPTIONS
        and " " in code
        and (
            code.split()[0] in programs or re.match(r"(launch|benchmarks)/\S+\.(sh|sbatch) ", code)
        )
    ]
    return [*document.commands, *inline]


def wrong_command(line: str) -> list[str]:
    """Problems of one line of a shell or of a synopsis."""
    line = re.sub(r"(?<=\s)\[([^\]]*)\]", r"\1", line)  # options that may be left out
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        return [f"{line}: {error}"]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    choices = [w.split("|") if re.fullmatch(r"[a-z]+(\|[a-z]+)+", w) else [w] for w in words]
    return [f"{line}: {p}" for each in itertools.product(*choices) for p in _wrong(list(each))]


def _wrong(words: list[str]) -> list[str]:
    if not words:
        return []
    program, rest = words[0], words[1:]
    if program == "swin-moe":
        return _wrong_call(rest)
    if program == "make":
        return _wrong_make(rest)
    if program in ("python", ".venv/bin/python", "torchrun", "pytest"):
        return _wrong_python(program, rest)
    if re.fullmatch(r"(launch|benchmarks)/[\w.]+", program):
        return _wrong_script(program, rest)
    if program in OUTSIDE:
        starts = [i for i, word in enumerate(rest) if re.match(r"swin-moe$|launch/", word)]
        return _wrong(rest[starts[-1] :]) if starts else []
    return [f"unknown command {program}"]


def _wrong_call(words: list[str]) -> list[str]:
    """Parse the words of ``swin-moe`` and read the config that they name."""
    words = [
        "local" if words[i - 1] == "--on" and word in ("…", "ENGINE") else word
        for i, word in enumerate(words)
    ]
    known = {option for options in options_of_commands().values() for option in options}
    if "…" in words:
        return [f"no option {w}" for w in words if w.startswith("--") and w not in known] or (
            [] if words[0] in options_of_commands() else [f"no command {words[0]}"]
        )
    words = ["1" if word in NUMBERS else word for word in words]
    words = [w for w in words if w not in ("key=value", "...")]
    if words in ([], ["--help"], ["COMMAND", "--help"]):
        return []
    if words[1:] == ["--help"]:
        return [] if words[0] in options_of_commands() else [f"no command {words[0]}"]
    if len(words) == 1 and words[0] in options_of_commands():
        return []  # the command by name
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            arguments = parse(words)
    except SystemExit:
        return [errors.getvalue().strip()]
    config = getattr(arguments, "config", "CONFIG")
    overrides = getattr(arguments, "overrides", [])
    return wrong_overrides(overrides, config)


def wrong_overrides(overrides: list[str], config: str = "CONFIG") -> list[str]:
    """Keys that do not exist and values that do not fit, with the whole config where it is real."""
    if re.fullmatch(r"CONFIG|my\.yaml|file\.yaml", config):
        return [p for word in overrides for p in wrong_key(word)]
    places = [ROOT / config, ROOT / "configs" / config, ROOT / f"configs/{config}.yaml"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return [f"no config {config}"]
    try:
        load_config(str(file), overrides)
    except ConfigError as error:
        return [str(error)]
    return []


def wrong_key(word: str) -> list[str]:
    """``section.key``, ``section.key=value`` or ``section.key: value``."""
    name, value = [*re.split(r"=|: ", word, maxsplit=1), ""][:2]
    section, _, key = name.partition(".")
    if former := {name, word} & FORMER:
        return [f"{former.pop()} is a former key"]
    fields = SECTIONS.get(section, {})
    if key == "*" and fields:
        return []
    if key not in fields:
        return [f"no key {name}"]
    if not value or re.fullmatch(r"[A-Z_]+|n|…|a\|b", value):  # a placeholder
        return []
    problems = []
    for kind in fields[key]:
        try:
            parsed = parse_overrides([f"{name}={value}"])[section][key]
            TypeAdapter(kind).validate_python(parsed, strict=True)
            return []
        except (ConfigError, ValidationError) as error:
            problems = [f"{word}: {' '.join(str(error).split())}"]
    return problems


@cache
def options_of_commands() -> dict[str, set[str]]:
    """The options of each command, those of its actions included."""

    def options(parser) -> set[str]:
        found = set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action.choices, dict):
                found |= set().union(*map(options, action.choices.values()))
        return found

    (commands,) = (a for a in build_parser()._actions if isinstance(a.choices, dict))
    return {name: options(parser) for name, parser in commands.choices.items()}


def _wrong_make(words: list[str]) -> list[str]:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    given = dict(w.split("=", 1) for w in words if re.match(r"[A-Z]+=", w))
    named = [w for w in words if not re.match(r"[A-Z]+=", w) and w not in ("-n", "…")]
    problems = [f"no target {name}" for name in named if name not in targets]
    problems += [
        f"no variable {n}" for n in given if f"$({n})" not in text and f"or $({n})" not in text
    ]
    extra = shlex.split(given.get("ARGS", ""))
    if named and named[0].startswith("test"):
        return problems + _wrong_pytest(extra)
    overrides = [w for w in extra if not w.startswith("-") and w != "key=value"]
    known = options_of_commands()["train"]
    problems += [f"no option {w}" for w in extra if w.startswith("-") and w not in known]
    return problems + wrong_overrides(overrides, given.get("CONFIG", "CONFIG"))


def _wrong_pytest(words: list[str]) -> list[str]:
    """Options of ours or of pytest, marks, paths, and names after ``-k``."""
    marks = set(re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    conftest = (ROOT / "tests/conftest.py").read_text()
    problems = []
    for option, word in zip(["", *words], words, strict=False):
        if option == "-m":
            problems += [
                f"no mark {m}" for m in re.findall(r"\w+", word) if m not in {*marks, "not", "and"}
            ]
        elif option == "-k":
            found = re.search(rf"def test_\w*{re.escape(word)}", _tests())
            problems += [] if found else [f"no test is called {word}"]
        elif word.startswith("--") and word.split("=")[0] not in ("--durations", "--dist"):
            problems += [] if f'"{word}"' in conftest else [f"no option {word}"]
        elif "/" in word and not (ROOT / word.split("::")[0]).exists():
            problems.append(f"no file {word}")
    return problems


@cache
def _tests() -> str:
    return "".join(file.read_text() for file in sorted((ROOT / "tests").rglob("test_*.py")))


def _wrong_python(program: str, words: list[str]) -> list[str]:
    if program == "pytest":
        return _wrong_pytest(words)
    if "-m" not in words:
        return [] if not words or (ROOT / words[0]).is_file() else [f"no file {words[0]}"]
    start = words.index("-m")
    module, rest = words[start + 1], words[start + 2 :]
    if module == "pytest":
        return _wrong_pytest(rest)
    if module == "swin_moe":
        return _wrong_call(rest)
    if (
        not module.startswith(("swin_moe.", "benchmarks.", "tests."))
        or importlib.util.find_spec(module) is None
    ):
        return [f"no module {module}"]
    source = Path(importlib.util.find_spec(module).origin).read_text()
    more = "".join(
        (ROOT / f"benchmarks/{f}.py").read_text() for f in ("harness", "first_contact/options")
    )
    return [
        f"{module} has no option {w}"
        for w in rest
        if w.startswith("--") and f'"{w}"' not in source + more
    ]


def _wrong_script(name: str, words: list[str]) -> list[str]:
    path = ROOT / name
    if not path.is_file():
        return [f"no file {name}"]
    text = path.read_text() + (ROOT / "launch/common.sh").read_text()
    flags = [w[2:].split("=")[0] for w in words if w.startswith("--")]
    options = set(
        re.findall(r"[a-z][a-z-]+", " ".join(re.findall(r'^options "([^"]*)"', text, re.MULTILINE)))
    )
    options |= set(re.findall(r"--([a-z-]+)", text))
    return [f"{name} has no option --{flag}" for flag in flags if flag not in options]
