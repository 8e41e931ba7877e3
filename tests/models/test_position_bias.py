"""The position bias that evaluation keeps: never another one than the weights give."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import prune

from tests.models.test_swin import lively

FAMILIES = ["swin", "swinv2", "swin_moe"]


def attention_of(model):
    return model.layers[0].blocks[0].attn


def count_computations(attention, monkeypatch):
    calls = []
    compute = attention._position_bias

    def counted(window_size):
        calls.append(window_size)
        return compute(window_size)

    monkeypatch.setattr(attention, "_position_bias", counted)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_it_once(family, context, monkeypatch):
    model = lively(family).eval()
    calls = count_computations(attention_of(model), monkeypatch)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).predictions.detach()  # with gradients: computed each time
    with context():
        for _ in range(3):
            assert torch.equal(model(images).predictions, expected)
    assert len(calls) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_weights_are_seen(family):
    model, images = lively(family).eval(), torch.randn(2, 3, 32, 32)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        model(images)
        for target in (model, changed):
            for name, parameter in target.named_parameters():
                if "cpb_mlp" in name or "bias_table" in name:
                    parameter.mul_(3)
        assert torch.equal(model(images)[0], changed(images)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["data", "numpy", "swapped"])
def test_weights_replaced_behind_autograds_back_are_seen(family, way):
    """As averages of weights do that stay in evaluation mode, and engines with masters."""
    model, images = lively(family).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images).predictions
        for parameter in model.parameters():
            if way == "data":
                parameter.data.mul_(0.5).add_(0.01)
            elif way == "numpy":
                parameter.numpy()[...] *= 0.5
            else:
                parameter.data = 0.5 * parameter.data
        after = model(images).predictions
        assert not torch.equal(before, after)
        assert torch.equal(after, copy.deepcopy(model).train().eval()(images)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_another_dtype_is_not_served_from_it(family):
    """Weights that are the same numbers in both, as those of a file in bf16."""
    model, images = lively(family).eval().bfloat16().float(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(images)
        kept = model.double()(images.double())[0]
        assert torch.equal(kept, model.train().eval()(images.double())[0])


def test_another_window_and_training_are_not_served_from_it(monkeypatch):
    model = lively("swinv2").eval()
    calls = count_computations(attention_of(model), monkeypatch)
    with torch.no_grad():
        for side in (32, 16, 32):
            model(torch.randn(1, 3, side, side))
        windows = len(calls)
        model.train()
        model(torch.randn(1, 3, 32, 32))
        model(torch.randn(1, 3, 32, 32))
    assert len(calls) == windows + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_in_for_the_parameters_is_not_kept(family):
    """Fake tensors have no storage to tell them apart by, and functional calls bring their own."""
    model, images = lively(family).eval(), torch.randn(2, 3, 32, 32)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    mode = FakeTensorMode()
    with torch.no_grad():
        with mode:
            fakes = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
            fake_images = torch.empty(2, 3, 32, 32)
            assert functional_call(model, fakes, (fake_images,)).predictions.shape == (2, 5)
        assert attention_of(model)._evaluated_bias is None
        other = {name: 2 * tensor for name, tensor in tensors.items()}
        expected = functional_call(copy.deepcopy(model).train(False), other, (images,))[0]
        model(images)  # keeps its own
        assert torch.equal(functional_call(model, other, (images,))[0], expected)


@pytest.mark.parametrize("family", ["swinv2", "swin_moe"])
def test_pruning_that_goes_on_is_seen(family):
    """Its mask is a buffer, and the parameter stays as it was."""
    model, images = lively(family).eval(), torch.randn(2, 3, 32, 32)
    linear = attention_of(model).cpb_mlp[0]
    with torch.no_grad():
        for _ in range(2):
            prune.l1_unstructured(linear, "weight", amount=0.6)
            assert torch.equal(model(images)[0], copy.deepcopy(model).train().eval()(images)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["to_empty", "assign", "rounded before"])
def test_loading_weights_sets_what_no_file_holds(family, way):
    """The coordinates of a model that was made without memory, or rounded to bf16 since."""
    model, images = lively(family).eval(), torch.randn(2, 3, 32, 32)
    if way == "rounded before":
        other = copy.deepcopy(model).bfloat16().float()
    else:
        other = copy.deepcopy(model).to("meta")
    if way == "to_empty":
        other.to_empty(device="cpu")
        for buffer in other.buffers():
            buffer.fill_(-7)
    other.load_state_dict(model.state_dict(), assign=way == "assign")
    with torch.no_grad():
        assert torch.equal(other(images)[0], model(images)[0])
