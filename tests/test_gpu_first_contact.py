"""The script for the first contact with a GPU, as far as it can be tested without one."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.first_contact import record, verify

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "benchmarks" / name for name in ("gpu_first_contact.sh", "gpu_wheels.sh")]
OPS = ["adamw_", "moe_combine", "moe_dispatch", "moe_experts", "moe_route", "window_attention"]
# Makes the packages that a GPU machine may lack impossible to import.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
MISSING = ("pydantic", "pydantic_core", "deepspeed", "fairscale", "simplejpeg", "webdataset")


def run(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A program with this session's interpreter for the script."""
    return subprocess.run(
        [*map(str, words)], cwd=ROOT, env=os.environ | env, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if shellcheck:
        assert run(shellcheck, script).stdout == ""
    told = run(script, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith("usage: ")
    assert run(script, "--bogus").returncode == 2


def test_the_list_of_steps_runs_none(tmp_path: Path) -> None:
    listed = run(SCRIPTS[0], "--list", "--out", tmp_path / "out")
    steps = [line.split()[0] for line in listed.stdout.splitlines()]
    assert steps[:2] == ["facts", "library"]
    assert {f"verify-{op}" for op in verify.FILES} < set(steps)
    for line in listed.stdout.splitlines():  # every module that a step runs is there
        module = line.split(" -m ")[1].split()[0]
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), line
    assert not (tmp_path / "out").exists()
    assert run(SCRIPTS[0], "--only", "nothing").stderr.startswith("error: no step")


def test_ops_tests_are_collected_without_the_packages_that_a_gpu_machine_lacks(
    tmp_path: Path,
) -> None:
    (tmp_path / "blocker.py").write_text(BLOCKER.format(missing=MISSING))
    found = run(
        sys.executable, "-m", "pytest", "-p", "blocker", "-p", "no:cacheprovider",
        "--collect-only", "tests/ops", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    for files in verify.FILES.values():
        for name in files:
            assert f"tests/ops/{name}" in found.stdout


def test_every_op_is_verified_by_a_step() -> None:
    pytest.importorskip("torch")
    from swin_moe import ops

    named = [op for step in verify.FILES for op in verify.SPEAKS_FOR.get(step, [step])]
    assert sorted(named) == sorted(ops.status()) == OPS


def contact(**outcomes: int) -> dict[str, Any]:
    """A record of steps that verified their op, or ended with these exit codes."""
    content = record.read(Path()) | {"rehearsal": False, "key": "card library"}
    content["machine"] = {"capability": "9.0"}
    for op in OPS:
        code = outcomes.pop(op, 0)
        found = {"verified": [op], "cells": [cell(op)]}
        record.add(content, f"verify-{op}", "card library", code, 1.0, "why", found)
    for step, code in outcomes.items():
        record.add(content, step, "card library", code, 1.0, "why", {})
    record.judge(content)
    return content


def cell(name: str) -> dict[str, Any]:
    return {"name": name, "dtype": "bfloat16", "mode": "forward", "unit": "ms", "ours": 1.0,
            "peers": {"timm": 3.0, "sdpa": 2.0}, "speedup": 2.0}  # fmt: skip


def line(content: dict[str, Any]) -> dict[str, set[tuple[int, int]]]:
    """The value that the statement assigns."""
    statement = ast.parse(content["verified_line"]).body[0]
    assert isinstance(statement, ast.AnnAssign)
    assert statement.value is not None
    return ast.literal_eval(statement.value)


def test_ops_that_passed_are_in_the_line() -> None:
    content = contact()
    assert content["verified"] == OPS
    assert line(content).keys() >= set(OPS)
    assert all((9, 0) in line(content)[op] for op in OPS)
    assert "(2.0x)" in record.summary(content)


@pytest.mark.parametrize("code", [1, 124, 137, record.NOT_RUN])
def test_an_op_whose_step_did_not_pass_is_not_named(code: int) -> None:
    content = contact(moe_route=code)
    assert content["verified"] == [op for op in OPS if op != "moe_route"]
    assert content["steps"]["verify-moe_route"]["reason"].endswith("why")
    assert not record.passed(content, "verify-moe_route", "card library")
    assert record.passed(content, "verify-moe_experts", "card library")


def test_errors_of_the_sanitizer_another_card_and_rehearsals_verify_nothing() -> None:
    assert contact(sanitizer=1)["verified_line"] == ""
    assert contact(sanitizer=record.NOT_RUN)["verified"] == OPS
    other = contact() | {"key": "card other-library"}
    record.judge(other)
    assert other["verified"] == []
    assert not record.passed(other, "verify-moe_route", "card other-library")
    rehearsed = contact() | {"rehearsal": True}
    record.judge(rehearsed)
    assert (rehearsed["verified"], rehearsed["verified_line"]) == ([], "")
    assert "rehearsal" in record.summary(rehearsed)


def test_a_step_that_is_run_again_replaces_its_cells_and_no_attempt_replaces_nothing() -> None:
    content = contact(moe_route=1)
    record.add(content, "verify-moe_route", "card library", record.NOT_RUN, 0, "no time", {})
    assert content["steps"]["verify-moe_route"]["outcome"] == "failed"
    record.add(content, "verify-moe_route", "card library", 0, 2.0, "", {"cells": [cell("new")]})
    own = [c["name"] for c in content["cells"] if c["step"] == "verify-moe_route"]
    assert own == ["new"]


def test_the_line_adds_to_what_was_verified_before() -> None:
    before = {"moe_route": {(8, 0)}, "moe_combine": {(9, 0)}}
    content = {"verified_line": record.verified_line(["moe_route"], "9.0", before)}
    assert line(content) == {"moe_route": {(8, 0), (9, 0)}, "moe_combine": {(9, 0)}}
    source = (ROOT / "swin_moe/ops/_library.py").read_text()
    assert isinstance(record.verified_before(source), dict)


def case(name: str, inside: str = "") -> str:
    return f'<testcase name="{name}">{inside}</testcase>'


def test_tests_of_the_device_are_counted_and_skips_for_no_gpu_are_a_problem() -> None:
    def count(*cases: str) -> verify.Count:
        return verify.count(f"<testsuite>{''.join(cases)}</testsuite>", "cuda")

    good = case("test_parity[w4x4-cuda-torch.float32]")
    assert count(good, case("test_parity[cpu]"), case("test_cuda_names")) == (1, 0, 0, 0)
    assert count(good).problem == ""
    assert count(case("test_parity[cpu]")).problem == "no test ran"
    skipped = case("test_a[cuda]", '<skipped message="no GPU, or the CUDA kernels are ..."/>')
    assert "skipped" in count(good, skipped).problem
    other = case("test_a[cuda]", '<skipped message="torch has no such product"/>')
    assert count(good, other).problem == ""
    assert count(good, case("test_b[cuda]", "<failure/>")).problem == "1 tests failed"
    assert count(good, case("tests.ops.test_c", "<error/>")).problem == "1 tests failed"
