"""The documentation names nothing that is not there, and its commands are those of the program.

A command is executed here or in ``test_docs_launch.py``, or parsed: subcommand, options, config
file, keys and values. Other programs are in ``OUTSIDE`` of ``documents/commands.py`` with the
reason. Links and anchors resolve.
"""

import re
import shlex

import pytest
import torch

from swin_moe.cli.main import main
from swin_moe.tasks import Task
from tests.documents import ROOT, broken_links, read
from tests.documents.commands import FORMER, commands_of, wrong_command
from tests.documents.names import wrong_names, wrong_python

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BINARY = (".so", ".pyc", ".gz", ".safetensors")
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    assert broken_links(read(path)) == []


def test_sources_name_pages_that_are_there():
    folders = ("swin_moe", "configs", "launch", "benchmarks", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    text = "\n".join(
        file.read_text(encoding="utf-8")
        for file in [*files, ROOT / "Makefile", ROOT / "Dockerfile", ROOT / "setup.py"]
        if file.name != "test_docs.py" and file.suffix not in BINARY and file.is_file()
    )
    pages = set(re.findall(r"\bdocs/\w+\.md(?:#[\w-]+)?", text))
    assert len(pages) > 5
    assert broken_links(read(ROOT / "README.md", "".join(f"[]({page})" for page in pages))) == []


def test_the_index_has_every_page():
    text = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [
        p.name for p in GUIDES[1:] if p.name != "README.md" and f"]({p.name})" not in text
    ] == []


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_commands_are_those_of_the_program(path):
    commands = commands_of(read(path))
    assert [problem for line in commands for problem in wrong_command(line)] == []


@pytest.mark.parametrize("path", [*GUIDES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_names_are_there(path):
    document = read(path)
    problems = wrong_names(document)
    if name_of(path) == "docs/command_line.md":  # which lists the former keys
        former = {f"{name} is a former key" for name in FORMER}
        assert former <= set(problems)
        problems = [p for p in problems if p not in former]
    assert problems == []


@pytest.mark.parametrize(
    "path", [p for p in GUIDES if p.name != "dense_prediction.md"], ids=name_of
)
def test_python_fits(path):
    assert [p for source in read(path).python for p in wrong_python(source)] == []


def test_the_table_of_a_task_has_its_contract():
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    members = set(re.findall(r"^   \| `(\w+)", text, re.MULTILINE))
    assert Task.__abstractmethods__ | {"metrics", "check"} <= members
    assert members <= {*dir(Task), *Task.__annotations__}


@pytest.mark.parametrize("line", ["models 'swinv2*'", "recipes", "recipes 'imagenet22k/swinv2_*'"])
def test_lists_are_printed(line, capsys):
    """Commands of the documents that need neither data nor time."""
    assert main(shlex.split(line)) == 0
    assert "swinv2_" in capsys.readouterr().out


def test_the_first_page_stays_short():
    assert (ROOT / "README.md").stat().st_size <= 9000


def given(name):
    """Names that a block of a page takes as given."""
    torch.manual_seed(0)
    if name == "docs/attention.md":
        return {"qkv": torch.randn(1, 8, 8, 3, 2, 16), "bias": torch.randn(2, 64, 64),
                "scale": torch.zeros(2, 1, 1)}  # fmt: skip
    return {"tokens": torch.randn(2, 2, 4, 512)}


@pytest.mark.parametrize("name", ["README.md", "docs/attention.md", "docs/moe.md"])
def test_python_runs(name):
    """The blocks of docs/dense_prediction.md run in tests/models/test_features.py."""
    namespace = given(name)
    for source in read(ROOT / name).python:
        exec(compile(source, name, "exec"), namespace)
    if name == "docs/attention.md":
        assert namespace["out"].shape == (1, 8, 8, 32)
    if name == "docs/moe.md":
        assert namespace["output"].shape == (2, 2, 4, 512)


FAULTS = [
    "```\nswin-moe trian configs/fashion_mnist/swin_moe_micro.yaml\n```\n",
    "```\nswin-moe train configs/fashion_mnist/swin_moe_nano.yaml\n```\n",
    "```\nswin-moe train CONFIG --frsh\n```\n",
    "```\nswin-moe train CONFIG zero.stag=1\n```\n",
    "```\nswin-moe train CONFIG zero.stage=7\n```\n",
    "```\nswin-moe train configs/fashion_mnist/swin_moe_micro.yaml model.depths=[2]\n```\n",
    "```\nswin-moe plan CONFIG --gpus many\n```\n",
    "```\nswin-moe checkpoint list|prune RUN\n```\n",
    "```\n$ make trian\noutput\n```\n",
    "```\nmake train CONFIG=my.yaml ARGS='data.pth=/data'\n```\n",
    "```\nmake train CONFG=my.yaml\n```\n",
    '```\nmake test ARGS="-m units"\n```\n',
    "```\nmake test ARGS='-k million_kills'\n```\n",
    "```\nmk train\n```\n",
    "```\npython -m benchmarks.kernel\n```\n",
    "```\npython -m benchmarks.learning --groups main\n```\n",
    "```\ntorchrun -m swin_moe train CONFIG --fresher\n```\n",
    "```\nlaunch/local.sh --process 2 CONFIG\n```\n",
    "```\nsbatch launch/slrm.sbatch CONFIG\n```\n",
    "```\ndocker run swin_moe swin-moe launch --on lokal CONFIG\n```\n",
    "| `swin-moe evaluate` | `swin-moe evaluate RUN --fresh` |\n",
    "Use `swin-moe launch … --docter`.\n",
    "Set `moe.topk=2`.\n",
    "Set `moe.top_k=two`.\n",
    "Set `moe.balance_weight=0.1`.\n",
    "Set `task.mask_ration`.\n",
    "`moe.routing: hard` is a mode.\n",
    "| key of `moe` | |\n|---|---|\n| `topk` | experts |\n",
    "Read `swin_moe/catalog.py`.\n",
    "Read `planner/tracer.py`.\n",
    "Read `common/{ranks,hosts}.py`.\n",
    "Call `task.preparing`.\n",
    "Read `csrc/cpu/windows_*.h`.\n",
    "Look at `sumary.png`.\n",
    "Read `logs/bad-samplings-rank-*.jsonl`.\n",
    "Call `swin_moe.models.build`, then `swin_moe.build_featurs(NAME)`.\n",
    "Give `--accept-change`.\n",
    "Set `SWIN_MOE_IAS=avx2`.\n",
    "See [moe](docs/mo.md).\n",
    "See [moe](docs/moe.md#capacity-in-evaluatio).\n",
    "See [below](#no-such-heading).\n",
    "![picture](docs/inspekt.png)\n",
    "```python\nfrom swin_moe.models import build_model_of\n```\n",
    "```python\nimport swin_moe\nswin_moe.load_confg('a')\n```\n",
    "```python\nimport swin_moe\nswin_moe.load_config()\n```\n",
    "```python\nprint(\n```\n",
    "```console\nmake train\n```\n",
]


def problems_of(document):
    return [
        *broken_links(document),
        *(p for line in commands_of(document) for p in wrong_command(line)),
        *wrong_names(document),
        *(p for source in document.python for p in wrong_python(source)),
    ]


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_found(text):
    assert problems_of(read(ROOT / "README.md", text))
