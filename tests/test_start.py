"""Starts import neither torch, if they do not need it, nor the compiler, nor foreign models."""

import json
import os
import subprocess
import sys

import pytest

from swin_moe.cli import models
from swin_moe.common import host
from tests.data.helpers import make_folder, make_shards
from tests.parallel import MICRO, PATIENCE, ROOT, environment, run_worker, training
from tests.saving import save

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
from swin_moe.cli.main import entry
entry()
"""


def run_without_torch(*words):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run with a checkpoint, shards, and a folder of images."""
    root = tmp_path_factory.mktemp("places")
    save(root / "run/checkpoints", 3, [], config_text="a: 1\n")
    (root / "shards").mkdir()
    make_shards(root / "shards", 4)
    make_folder(root / "images/train", ["ant", "bee"])
    return root


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("--help", "COMMAND"),
        ("models swin_moe_base*", "swin_moe_base_8expert_window12_192_22k"),
        ("recipes", "fashion_mnist/swin_moe_micro"),
        ("checkpoint list {root}/run", "step-00000003"),
        ("checkpoint verify {root}/run", "whole"),
        ("data verify {root}/shards --output {root}/bad.jsonl", "4 samples"),
        ("data verify {root}/images --output {root}/bad.jsonl", "2 classes"),
        ("prepare-data {root}/images {root}/out", "data.path="),
        (f"launch --on local --dry-run {MICRO}", "swin_moe.launch.torchrun"),
    ],
)
def test_commands_that_need_no_torch_do_not_import_it(places, words, printed):
    done = run_without_torch(*words.format(root=places).split())
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    assert done.stderr == ""


def test_training_imports_no_compiler_and_no_foreign_models(tmp_path):
    words = training(tmp_path / "run", "train.max_steps=1", "parallel.expert_parallel_size=1")
    (tmp_path / "train.json").write_text(json.dumps(words))
    run_worker("deferred", tmp_path, 1)
    assert (tmp_path / "passed").exists()


def test_the_table_of_models_equals_a_new_count():
    assert json.loads(models.COUNTS.read_text()) == models.count_all(), (
        "python -m swin_moe.cli.models writes the table again"
    )


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4), ("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("GPU-5,GPU-6,GPU-7", 3),
        ("0,-1,1", 1), ("NoDevFiles", 0),
    ],
)  # fmt: skip
def test_gpus_are_counted_without_torch(tmp_path, monkeypatch, visible, count):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i: one; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert host.count_gpus() == count
    script = f"source {ROOT}/launch/common.sh; count_gpus"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == count


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "a"}, {"PYTORCH_ALLOC_CONF": "a"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, {"PYTORCH_CUDA_ALLOC_CONF": "a"}),
    ],
)
def test_the_allocator_of_gpus_is_set_unless_the_user_has(monkeypatch, given, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    script = f"source {ROOT}/launch/common.sh; env"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    exported = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {name: exported[name] for name in names if name in exported} == expected
    host.use_expandable_segments()
    assert {name: os.environ[name] for name in names if name in os.environ} == expected
