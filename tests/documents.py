"""What the documentation names, checked against the repository: the helpers of test_docs.py.

A document is read into links, commands, inline code and Python blocks. Each check returns a list of
problems, one line each. The conventions of the documents:

- A fenced block without a language, or an indented one, holds commands. If a line begins with
  ``$ ``, only such lines do. Output is in a block of the language ``text``.
- ``[--option VALUE]`` may be left out, ``a|b`` is each of a and b, and ``…`` is more words.
- Words in capitals stand for what a reader fills in.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from swin_moe.cli.parser import build_parser, parse
from swin_moe.config import Config, ConfigError, load_config, parse_overrides
from swin_moe.config.renamed import RENAMED

ROOT = Path(__file__).parent.parent
MICRO = ROOT / "configs/fashion_mnist/swin_moe_micro.yaml"
FOLDERS = ("swin_moe", "configs", "launch", "tests", "benchmarks", "docs", "requirements", "csrc")
CODE = (".py", ".h", ".cu", ".cuh", ".cpp", ".sh", ".sbatch")
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
FORMER = {".".join(key) for key in RENAMED}
# Programs of others, and why their commands are not checked. Ours inside them are.
OUTSIDE = {
    "docker": "needs a container engine",
    "apt": "installs packages of the system",
    "pip": "installs packages",
    ".venv/bin/pip": "installs packages",
    "sbatch": "needs Slurm",
    "squeue": "needs Slurm",
    "ssh": "needs another host",
    "kubectl": "needs Kubernetes",
    "scancel": "needs Slurm",
    "salloc": "needs Slurm",
    "srun": "needs Slurm",
    "mpirun": "needs Open MPI",
    "mkdir": "of the shell",
    "cat": "of the shell",
    "tensorboard": "serves until it is stopped",
}
OUTSIDE_OPTIONS = {  # of docker and the like, named by themselves
    "--gpus": "docker", "--shm-size": "docker", "--user": "docker", "--ipc": "docker",
    "--build-arg": "docker",
}  # fmt: skip
NUMBERS = {"N", "M", "P", "SHARE", "PIXELS", "SECONDS", "MB"}  # placeholders
# Text in backquotes that looks like a key, a file or a command, and is none.
EXCEPTIONS = {
    "data.png", "model.safetensors", "train.json", "train.zip", "train.index.npy", "config.yaml",
    "model_ema", "swin-moe r0", "swin-moe r1", "data/train-*.parquet", "ops.status()",
}  # fmt: skip


class Document(NamedTuple):
    """A Markdown file in parts; ``commands`` and ``inline`` are lines of code."""

    path: Path
    prose: str  # without fenced and indented blocks
    commands: list[str]
    python: list[str]
    inline: list[str]

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


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


# Links


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> set[str]:
    return {anchor(m[1]) for m in re.finditer(r"^#+ (.+)$", read(path).prose, re.MULTILINE)}


def broken_links(document: Document) -> list[str]:
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.prose):
        if target.startswith(("http://", "https://")):
            continue
        file, _, part = target.partition("#")
        path = (document.path.parent / file).resolve() if file else document.path
        if not path.exists():
            problems.append(f"link to {target}: no such file")
        elif part and part not in (
            anchors(path)
            if file
            else {anchor(h) for h in re.findall(r"^#+ (.+)$", document.prose, re.MULTILINE)}
        ):
            problems.append(f"link to {target}: no such heading")
    return problems


# Commands


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
    if name in FORMER:
        return [f"{name} is a former key"]
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
            found = any(word in text for text in _tests())
            problems += [] if found else [f"no test is called {word}"]
        elif word.startswith("--") and word.split("=")[0] not in ("--durations", "--dist"):
            problems += [] if f'"{word}"' in conftest else [f"no option {word}"]
        elif "/" in word and not (ROOT / word.split("::")[0]).exists():
            problems.append(f"no file {word}")
    return problems


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


# Other names in backquotes


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
    if re.fullmatch(rf"{section}(\w+|\*)(: .*|=\S*)?", code):
        return wrong_key(code)
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
    if not re.fullmatch(r"[\w./*-]+", code):
        return []
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
def _tests() -> list[str]:
    """Texts of the test files, without the one that has wrong names on purpose."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file.read_text() for file in files if file.name != "test_docs.py"]


@cache
def _sources() -> str:
    paths = [ROOT / "setup.py", *(ROOT / "swin_moe").rglob("*.py"), ROOT / "tests/grid.py"]
    paths += [*(ROOT / "launch").iterdir(), *(ROOT / "swin_moe/csrc").rglob("*.*")]
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
