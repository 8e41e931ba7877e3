"""``train.compile`` in engines and runs, its cache, and a machine without a compiler."""

import json

import pytest

from swin_moe.config import Config, idle_keys
from tests.parallel import run_worker, start, training


def test_engines_train_with_graphs_as_without(tmp_path):
    run_worker("compiled", tmp_path, processes=2)
    assert (tmp_path / "passed").exists()


def test_a_second_start_compiles_nothing(tmp_path):
    for _ in range(2):
        run_worker("graph_cache", tmp_path, processes=1)
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert first == {"hit": 0, "miss": 2, "bypass": 0}  # forward and backward
    assert second == {"hit": 2, "miss": 0, "bypass": 0}


def test_a_run_without_a_compiler_goes_on_in_eager_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    words = ["train.max_steps=1", "parallel.expert_parallel_size=1", "train.compile=auto"]
    done = start("swin_moe", *training(tmp_path / "run", *words)).finish()
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "compile:" in line]
    assert len(lines) == 1
    assert "compile: off, because the compiler failed: InvalidCxxCompiler" in lines[0]
    assert done.stderr.count("\n") == 1  # that line, and nothing of torch's own


def test_zero_3_has_no_graphs():
    with pytest.raises(ValueError, match=r"train\.compile=true needs zero\.stage 0, 1 or 2"):
        Config(train={"compile": True}, zero={"stage": 3})
    auto = Config(train={"compile": "auto"}, zero={"stage": 3})
    assert "train.compile with zero.stage=3" in idle_keys(auto)
