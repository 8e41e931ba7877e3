"""Checkpoints and conversions keep the bias on the choice of experts."""

import pytest
import torch
from rich.console import Console

from swin_moe.config import Config, ModelConfig, MoEConfig, dump_config
from swin_moe.models import build
from swin_moe.weights.convert import convert
from swin_moe.weights.pretrained import load_pretrained, read_pretrained
from tests.saving import save_model

MODEL = ModelConfig(img_size=16, patch_size=2, num_classes=5, embed_dim=8, depths=[1, 2],
                    num_heads=[1, 2], window_size=4)  # fmt: skip
MOE = MoEConfig(blocks=[[], [1]], num_experts=4, expert_bias_update_rate=0.01, num_shared_experts=1)
RISES = [3, -(2**40) - 1, 0, 5]
NAME = "layers.1.blocks.1.mlp.choice_bias.rises"


@pytest.fixture
def run_checkpoint(tmp_path):
    model = build(MODEL, MOE)
    model.get_buffer(NAME).copy_(torch.tensor(RISES))
    return save_model(tmp_path, 1, model, dump_config(Config(model=MODEL, moe=MOE)))


def test_a_checkpoint_can_be_evaluated_and_trained_on(run_checkpoint):
    model = build(MODEL, MOE)
    load_pretrained(model, read_pretrained(run_checkpoint))
    assert model.get_buffer(NAME).tolist() == RISES
    load_pretrained(build(MODEL, MoEConfig(**{**MOE.model_dump(), "expert_bias_update_rate": 0.0})),
                    read_pretrained(run_checkpoint))  # fmt: skip


def test_convert_keeps_it(run_checkpoint, tmp_path):
    convert(run_checkpoint, tmp_path / "w.safetensors", Console(quiet=True))
    source = read_pretrained(tmp_path / "w.safetensors")
    assert source.state[NAME].tolist() == RISES
    model = build(MODEL, MOE)
    load_pretrained(model, source)
    assert model.get_buffer(NAME).tolist() == RISES
    with pytest.raises(ValueError, match="no mixtures of experts"):
        convert(run_checkpoint, tmp_path / "w.pth", Console(quiet=True), dialect="official")


def test_weights_without_a_bias_leave_it_at_zero(run_checkpoint, tmp_path):
    source = read_pretrained(run_checkpoint)
    del source.state[NAME]
    model = build(MODEL, MOE)
    load_pretrained(model, source)
    assert model.get_buffer(NAME).tolist() == [0] * 4
