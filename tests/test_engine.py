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


@pytest.mark.parametrize(
    ("capability", "bf16", "auto", "other"),
    [((6, 1), False, "fp32", "fp32"), ((7, 0), False, "fp16", "fp16"),
     ((7, 5), False, "fp16", "fp16"), ((8, 0), True, "bf16", "")],
)  # fmt: skip
def test_a_gpu_without_bf16_computes_in_fp16_or_fp32(monkeypatch, capability, bf16, auto, other):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda = torch.device("cuda")

    def resolved(dtype):
        return precision.resolve_precision(PrecisionConfig(dtype=dtype), cuda)

    assert resolved("auto") == precision.DTYPES[auto]
    assert resolved("fp16") == torch.float16
    assert resolved("fp32") == torch.float32
    if bf16:
        assert resolved("bf16") == torch.bfloat16
    else:
        with pytest.raises(ValueError, match=rf"no bf16; use precision\.dtype={other}"):
            resolved("bf16")


def test_fp16_needs_a_cpu_with_its_instructions(monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda answer=supported: answer
        )
        wanted = PrecisionConfig(dtype="fp16")
        if supported:
            assert precision.resolve_precision(wanted, torch.device("cpu")) == torch.float16
        else:
            with pytest.raises(ValueError, match=r"dtype=fp16: this CPU has no fp16"):
                precision.resolve_precision(wanted, torch.device("cpu"))


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
