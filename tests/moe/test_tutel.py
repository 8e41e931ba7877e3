"""The Tutel backend equals our layer; without Tutel it raises one line."""

import importlib.util

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe import build_moe
from tests.moe.test_modes import MODES, images, make, run

INSTALLED = importlib.util.find_spec("tutel") is not None
needs_tutel = pytest.mark.skipif(
    not INSTALLED, reason="Tutel is not installed (it is not in the package index)"
)
SUPPORTED = ["top-1", "top-2", "top-3 by index", "every expert", "dropless", "cosine",
             "gshard and z-loss", "shared expert", "no fc2 bias"]  # fmt: skip


@pytest.mark.skipif(INSTALLED, reason="Tutel is installed: its absence cannot be shown")
def test_missing_tutel_is_one_line():
    with pytest.raises(ValueError, match=r"moe.backend=tutel needs Tutel.*moe.backend=fused"):
        build_moe(8, 16, MoEConfig(backend="tutel"))


@needs_tutel
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", SUPPORTED)
def test_equals_our_layer(mode, training):
    """Outputs and gradients are equal, except with expert dropout, which draws other numbers."""
    make(mode, "tutel")(images())  # runs the self-check, which draws random numbers
    theirs = run(make(mode, "tutel").train(training), images())
    ours = run(make(mode).train(training), images())
    for name, value in ours.items():
        torch.testing.assert_close(
            theirs[name], value, rtol=1e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@needs_tutel
def test_a_token_that_is_not_finite_is_not_spread():
    x = images()
    x[1, 2, 3, 0] = float("nan")
    result = run(make("top-1", "tutel").eval(), x)
    assert result["sums"][3] == 1
    assert result["output"].isfinite().all()
    assert result["experts.fc1.weight"].isfinite().all()


@pytest.mark.parametrize("mode", sorted(set(MODES) - set(SUPPORTED) - {"dropout"}))
def test_settings_that_tutel_lacks_are_refused(mode):
    with pytest.raises(ValueError, match=r"moe.backend=tutel has no moe\..*moe.backend=fused"):
        make(mode, "tutel")


@needs_tutel
def test_a_changed_tutel_fails_loudly(monkeypatch):
    from tutel.impls import moe_layer

    from swin_moe.moe import tutel

    original = moe_layer.fast_decode
    monkeypatch.setattr(moe_layer, "fast_decode", lambda *args: original(*args) * 1.01)
    monkeypatch.setattr(tutel, "_checked", set())
    layer = build_moe(16, 32, MoEConfig(num_experts=4, backend="tutel"))
    with pytest.raises(ValueError, match="computes otherwise"):
        layer(torch.randn(8, 16))
