"""Decisions of the engine before DeepSpeed starts."""

import pytest
import torch

from swin_moe.config import PrecisionConfig
from swin_moe.training import precision
from tests.parallel import run_worker


def test_precision_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    assert precision.resolve_precision(PrecisionConfig(dtype="fp32"), cpu) == torch.float32
    assert precision.resolve_precision(PrecisionConfig(dtype="bf16"), cpu) == torch.bfloat16
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_computes_in_bf16", lambda answer=supported: answer)
        assert precision.resolve_precision(PrecisionConfig(dtype="auto"), cpu) == dtype


def test_a_gpu_without_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    cuda = torch.device("cuda")
    assert precision.resolve_precision(PrecisionConfig(dtype="auto"), cuda) == torch.float32
    with pytest.raises(ValueError, match=r"precision\.dtype=fp32"):
        precision.resolve_precision(PrecisionConfig(dtype="bf16"), cuda)


def test_another_deepspeed_is_refused_in_one_line(monkeypatch):
    from swin_moe.training import engine

    engine.check_deepspeed()
    monkeypatch.delattr(engine.deepspeed_groups, "_EXPERT_PARALLEL_GROUP")
    with pytest.raises(ValueError, match=r"DeepSpeed 0\.\S+ is not supported .*lock\.txt"):
        engine.check_deepspeed()


@pytest.mark.parametrize("processes", [1, 2])
def test_layer_decay_at_every_stage_equals_plain_adamw(tmp_path, processes):
    run_worker("layer_decay", tmp_path, processes)
    assert (tmp_path / "passed").exists()


def test_pretrained_weights_reach_the_masters_unrounded(tmp_path):
    run_worker("pretrained", tmp_path, processes=2)
    assert (tmp_path / "passed").exists()
