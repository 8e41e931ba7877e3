"""Whole models with the attention kernels equal the same models on the reference."""

import importlib

import pytest
import torch

from swin_moe import build_model, ops
from swin_moe.ops import choice
from tests.ops import devices

op = importlib.import_module("swin_moe.ops.window_attention")
needs_library = devices.needs_library("window_attention")
SHAPE = {
    "img_size": 64,
    "patch_size": 4,
    "num_classes": 10,
    "embed_dim": 64,
    "depths": [2, 2],
    "num_heads": [2, 4],  # of width 32
    "window_size": 4,
    "drop_path_rate": 0.0,
}


def small(family):
    """Build a model in which every part matters, with random norms instead of zeros."""
    torch.manual_seed(0)
    name = "swin_moe_small_dense_window12_192_22k" if family == "swin_moe" else family
    model = build_model(name, **SHAPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Record which calls of the op used its kernels."""
    served = []
    fits = op.fits_kernel

    def counted(qkv, windows):
        served.append(fits(qkv, windows))
        return served[-1]

    monkeypatch.setattr(op, "fits_kernel", counted)
    return served


def on_the_reference(monkeypatch):
    monkeypatch.setattr(op, "fits_kernel", lambda qkv, windows: False)


@needs_library
@pytest.mark.parametrize("size", [(64, 64), (60, 44)])
@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_logits_and_gradients(family, size, calls, monkeypatch):
    model, images = small(family), torch.randn(2, 3, *size)

    def run():
        model.zero_grad()
        logits = model(images).predictions
        logits.square().sum().backward()
        return logits, {name: p.grad for name, p in model.named_parameters()}

    logits, gradients = run()
    assert calls == [True] * 4
    on_the_reference(monkeypatch)
    expected, expected_gradients = run()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().clamp(min=1e-2)
        error = (gradient - expected_gradients[name]).abs().max() / scale
        assert error < 2e-4, f"{name}: {error}"


@needs_library
def test_the_training_curve_equals_the_references(calls, monkeypatch):
    """Losses of 30 steps of AdamW from one seed agree to 1e-4."""

    def losses():
        model = small("swinv2").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(16, 3, 64, 64, generator=generator)
        labels = torch.randint(10, (16,), generator=generator)
        found = []
        for _ in range(30):
            loss = torch.nn.functional.cross_entropy(model(images).predictions, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    fused = losses()
    assert all(calls)
    on_the_reference(monkeypatch)
    reference = losses()
    assert reference[-1] < 0.5 * reference[0]  # it learns
    assert fused == pytest.approx(reference, rel=1e-4)
    assert fused != reference  # by rounding


@needs_library
def test_kernels_can_be_switched_off(monkeypatch, calls):
    monkeypatch.setattr(choice, "_wanted", True)
    monkeypatch.setattr(choice, "_required", False)
    ops.use_references()
    assert set(ops.status().values()) == {"reference"}
    small("swinv2")(torch.randn(1, 3, 64, 64))
    assert not any(calls)
    with pytest.raises(ValueError, match=r"ops\.fused=false"):
        ops.require_fused("cpu")


@needs_library
def test_one_graph_holds_the_op_of_every_block():
    model, images = small("swinv2").eval(), torch.randn(2, 3, 60, 44)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images)[0], model(images)[0])
    torch._dynamo.reset()
    (targets,) = graphs
    assert sum("window_attention" in target for target in targets) == 4
    assert not any("softmax" in target or "roll" in target for target in targets)


@needs_library
def test_checkpointing_recomputes_the_same(calls):
    images = torch.randn(2, 3, 60, 44)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(
            "swinv2", **{**SHAPE, "attn_drop_rate": 0.3, "use_checkpoint": checkpointing}
        )
        model.load_state_dict(small("swinv2").state_dict())
        torch.manual_seed(1)
        model.train()(images).predictions.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(calls) == 4 + 8  # forward, then forward and its recomputation
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_a_mixture_computes_in_double():
    torch.manual_seed(0)
    moe = {"blocks": [[1], [1]], "num_experts": 4, "gate_noise": 0.0, "balance": "gshard"}
    model, images = build_model("swinv2_moe", moe=moe, **SHAPE), torch.randn(2, 3, 64, 64)
    for train in (False, True):
        expected = model.float().train(train)(images).predictions
        logits = model.double()(images.double()).predictions
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits.float(), expected)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
