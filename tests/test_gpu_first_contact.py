"""The script for the first contact with a GPU, as far as it can be tested without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.first_contact import record, trials, verify
from swin_moe import ops
from swin_moe.ops import Choice

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "benchmarks" / name for name in ("gpu_first_contact.sh", "gpu_wheels.sh")]
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
    assert steps[:3] == ["facts", "library", "trials"]
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


def test_every_op_has_a_step_with_its_tests_and_a_trial() -> None:
    assert {*verify.FILES, "moe_combine"} == set(ops.status())  # its tests are moe_dispatch's
    single = trials.signatures("cuda", torch.float32)
    half = trials.signatures("cuda", torch.float16)
    assert {key.op for key in single} == set(ops.status())
    assert {key.op for key in half} == set(ops.status()) - {"moe_route", "adamw_"}
    shapes = [key.shape for key in half if key.op == "window_attention"]
    assert shapes == [(8, 8, 32), (16, 16, 32)]
    assert [key for key in trials.signatures("cpu", torch.float32) if key.shape] == []


def test_a_refused_kernel_is_a_failure_and_a_slower_one_is_not() -> None:
    route, *others = trials.signatures("cpu", torch.float32)
    found = dict.fromkeys([route, *others], Choice(True, speedup=2.0))
    found[route] = Choice(True, "its kernel takes 3.0 times as long", 0.3)
    assert trials.problem(found, list(found)) == ""
    found[route] = Choice(False, "the kernel left the output not finite")
    assert trials.problem(found, list(found)).startswith(f"1 of {len(found)} refused: {route}: ")
    assert trials.problem({}, others[:1]) == f"1 of 1 refused: {others[0]}: no kernel"


def test_choices_are_in_the_summary() -> None:
    kernels = {
        "moe_route float32": {"right": True, "reason": "", "speedup": 2.04},
        "moe_experts float32": {"right": False, "reason": "the kernel failed", "speedup": 0.0},
    }
    content = record.read(Path())
    record.add(content, "trials", "card library", 1, 1.0, "why", {"kernels": kernels})
    lines = [line.split() for line in record.summary(content).splitlines()]
    assert ["moe_route", "float32", "yes", "2.0"] in lines
    assert ["moe_experts", "float32", "no", "0.0", "the", "kernel", "failed"] in lines


def contact(**codes: int) -> dict[str, Any]:
    """A record of the ops' steps, which passed or ended with these exit codes."""
    content = record.read(Path())
    for op in verify.FILES:
        found = {"tests": {"passed": 3}, "cells": [cell(op)]}
        record.add(content, f"verify-{op}", "card library", codes.get(op, 0), 1.0, "why", found)
    return content


def cell(name: str) -> dict[str, Any]:
    return {"name": name, "dtype": "bfloat16", "mode": "forward", "unit": "ms", "ours": 1.0,
            "peers": {"timm": 3.0, "sdpa": 2.0}, "speedup": 2.0}  # fmt: skip


@pytest.mark.parametrize("code", [1, 124, 137, record.NOT_RUN])
def test_a_step_that_did_not_pass_is_run_again(code: int) -> None:
    content = contact(moe_route=code)
    assert content["steps"]["verify-moe_route"]["reason"].endswith("why")
    assert not record.passed(content, "verify-moe_route", "card library")
    assert record.passed(content, "verify-moe_experts", "card library")
    assert content["steps"]["verify-moe_experts"]["tests"] == {"passed": 3}
    assert not record.passed(content, "verify-moe_experts", "card other-library")
    assert "(2.0x)" in record.summary(content)


def test_a_step_that_is_run_again_replaces_its_cells_and_no_attempt_replaces_nothing() -> None:
    content = contact(moe_route=1)
    record.add(content, "verify-moe_route", "card library", record.NOT_RUN, 0, "no time", {})
    assert content["steps"]["verify-moe_route"]["outcome"] == "failed"
    record.add(content, "verify-moe_route", "card library", 0, 2.0, "", {"cells": [cell("new")]})
    own = [c["name"] for c in content["cells"] if c["step"] == "verify-moe_route"]
    assert own == ["new"]


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
