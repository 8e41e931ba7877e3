"""The Tutel backend equals ours where Tutel is installed, and says so where it is not."""

import importlib.util

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe import build_moe

INSTALLED = importlib.util.find_spec("tutel") is not None


@pytest.mark.skipif(INSTALLED, reason="Tutel is installed: its absence cannot be shown")
def test_missing_tutel_is_one_line():
    with pytest.raises(ValueError, match=r"moe.backend=tutel needs Tutel.*moe.backend=fused"):
        build_moe(8, 16, MoEConfig(backend="tutel"))


@pytest.mark.skipif(not INSTALLED, reason="Tutel is not installed (it is not in the package index)")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("batch_prioritized", [True, False])
def test_equals_our_layer(batch_prioritized, top_k, training):
    moe = MoEConfig(
        num_experts=4, top_k=top_k, batch_prioritized=batch_prioritized, backend="tutel"
    )
    theirs = build_moe(16, 32, moe).train(training)
    theirs.experts.reset_parameters(0.2)
    ours = build_moe(16, 32, moe.model_copy(update={"backend": "reference"})).train(training)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 5, 16)
    theirs(x)  # the self-check comes before the first use and draws of its own
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(0)
        results.append(layer(x))
    flat = [(*result[:2], *result[2]) for result in results]
    for mine, other in zip(*flat, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.skipif(not INSTALLED, reason="Tutel is not installed (it is not in the package index)")
def test_a_changed_tutel_fails_loudly(monkeypatch):
    from tutel.impls import moe_layer

    from swin_moe.moe.backends import tutel

    original = moe_layer.fast_decode
    monkeypatch.setattr(moe_layer, "fast_decode", lambda *args: original(*args) * 1.01)
    monkeypatch.setattr(tutel, "_checked", set())
    layer = build_moe(16, 32, MoEConfig(num_experts=4, backend="tutel"))
    with pytest.raises(ValueError, match="routes or differentiates otherwise"):
        layer(torch.randn(8, 16))
