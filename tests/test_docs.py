"""The documentation names nothing that is not there, and its commands are those of the program.

A command is executed here, or parsed: subcommand, options, config file, keys and values. Commands
of other programs are in ``documents.OUTSIDE`` with the reason. Links and anchors resolve.
"""

import pytest
import torch

from swin_moe.cli.main import main
from swin_moe.config.renamed import RENAMED
from tests import documents
from tests.documents import ROOT, read

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    assert documents.broken_links(read(path)) == []


def test_the_index_has_every_page():
    text = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [p.name for p in GUIDES[1:] if p.name != "README.md" and f"]({p.name})" not in text] == []


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_commands_are_those_of_the_program(path):
    commands = documents.commands_of(read(path))
    assert [problem for line in commands for problem in documents.wrong_command(line)] == []


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_names_are_there(path):
    document = read(path)
    problems = documents.wrong_names(document)
    if name_of(path) == "docs/command_line.md":  # which lists the former keys
        former = {f"{name} is a former key" for name in documents.FORMER}
        assert former <= set(problems)
        problems = [p for p in problems if p not in former]
    assert problems == []


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_python_fits(path):
    assert [p for source in read(path).python for p in documents.wrong_python(source)] == []
