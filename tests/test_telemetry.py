"""The trainer's side of telemetry, on one process and on two; what it costs is in no test."""

import pytest
import torch

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import build
from tests.parallel import run_worker

MODEL = ModelConfig(
    img_size=16, patch_size=2, in_chans=1, num_classes=5, embed_dim=8, depths=[1, 2],
    num_heads=[1, 2], window_size=4,
)  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_bias_follows_all_ranks_and_nan_is_reported_with_layer_and_rank(tmp_path, processes):
    run_worker("telemetry", tmp_path, processes)
    assert (tmp_path / "passed").read_text() == "2"


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice", "soft"])
def test_in_evaluation_a_spoilt_image_spoils_no_other(routing):
    torch.manual_seed(0)
    moe = MoEConfig(blocks=[[], [1]], num_experts=4, routing=routing)
    model = build(MODEL, moe).eval()
    for parameter in model.parameters():  # block norms start at zero: wake every path up
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
    images = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        clean = model(images)
        images[2, 0, 5, 7] = torch.nan
        spoilt = model(images)
    others = [0, 1, 3]
    torch.testing.assert_close(
        spoilt.predictions[others], clean.predictions[others], rtol=1e-5, atol=1e-6
    )
    assert spoilt.predictions[2].isnan().any()
    assert spoilt.routing.nonfinite.sum() > 0
    assert clean.routing.nonfinite.sum() == 0
