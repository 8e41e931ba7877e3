"""Each launch of the documentation prints what it would run."""

import re
import shlex

import pytest

from tests.documents import ROOT, read
from tests.documents.commands import commands_of
from tests.parallel import MICRO, start

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Processes on CPUs where an engine looks for the GPUs of this machine.
HERE = {"local": ["--cpu", "--gpus-per-node", "2"], "torchrun": ["--cpu"]}


def launches():
    """The words of each ``swin-moe launch`` that is written out."""
    lines = {line for path in PAGES for line in commands_of(read(path))}
    split = [shlex.split(line, comments=True) for line in lines if not re.search(r"[…\\[]", line)]
    return sorted(words[2:] for words in split if words[:2] == ["swin-moe", "launch"] and words[3:])


def engine_of(words):
    return words[words.index("--on") + 1]


@pytest.fixture
def folder(tmp_path):
    """The files that the documents name."""
    (tmp_path / "hosts").write_text("node0 slots=8\nnode1 slots=8\n")
    (tmp_path / "rates.txt").write_text("optimizer.base_lr=1e-3\n")
    return tmp_path


def test_launches_print_what_they_would_run(folder):
    started = {}
    for words in launches():
        call = [str(MICRO) if word == "CONFIG" else word for word in words if word != "--dry-run"]
        call = [str(ROOT / word) if word.startswith("configs/") else word for word in call]
        call += HERE.get(engine_of(words), [])
        if engine_of(words) == "torchrun" and "--gpus-per-node" not in call:
            call += ["--gpus-per-node", "2"]
        program = start("swin_moe", "launch", *call, "--dry-run", folder=folder)
        started[shlex.join(words)] = program
    ended = {line: program.finish() for line, program in started.items()}
    assert {line: done.stderr for line, done in ended.items() if done.returncode} == {}
    assert all(done.stdout for done in ended.values())
    assert {engine_of(words) for words in launches()} == {
        "local", "torchrun", "slurm", "deepspeed", "mpi", "kubernetes",
    }  # fmt: skip


def test_the_manifest_of_the_page_is_the_one_that_is_printed():
    text = (ROOT / "docs/launching.md").read_text(encoding="utf-8")
    block = re.search(r"```\n\$ swin-moe (launch --on kubernetes .*)\n((?:.*\n)*?)…\n```", text)
    assert block is not None
    done = start("swin_moe", *shlex.split(block[1])).finish()
    assert done.stdout.startswith(block[2])
