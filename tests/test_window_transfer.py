"""Trained at one window, used at a larger one without fine-tuning: what Swin V2's paper claims."""

import pytest
import torch

from benchmarks.window_transfer import accuracy, train, transferred
from swin_moe.config import Architecture
from swin_moe.weights.files import write


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small V2 after 600 steps at 32 pixels and window 4: half a minute of real learning."""
    model = train("swinv2", 600)
    path = tmp_path_factory.mktemp("transfer") / "trained.safetensors"
    write(path, dict(model.named_parameters()), Architecture(model=model.config))
    return model, path


@pytest.mark.parametrize(("pixels", "window", "share"), [(48, 6, 0.8), (64, 8, 0.75)])
def test_most_of_the_accuracy_is_kept_at_a_larger_window(trained, pixels, window, share):
    model, path = trained
    before = accuracy(model, 1000, 32)
    assert before > 65
    after = accuracy(transferred(path, "swinv2", pixels, window, own=False), 1000, pixels)
    assert after > share * before, f"{before:.1f} % at window 4, {after:.1f} % at {window}"


def test_the_pretrained_window_counts(trained):
    """Both settings keep the accuracy here, so that alone would not show which one is in use."""
    images = torch.randn(2, 1, 64, 64)
    known, own = (transferred(trained[1], "swinv2", 64, 8, own=own).eval() for own in (False, True))
    assert (known(images)[0] - own(images)[0]).abs().max() > 1e-3


def test_the_same_size_is_the_same_model(trained):
    model, path = trained
    again = transferred(path, "swinv2", 32, 4, own=False)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(again.eval()(images)[0], model(images)[0])
