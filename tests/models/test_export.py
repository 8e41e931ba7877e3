"""torch.export, ONNX and torch.jit.trace: a graph of torch's ops that computes what the model does.

Heads are 16 and 32 wide, which the kernels know: narrower ones run their reference everywhere.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from swin_moe.config import MoEConfig
from tests.models.test_swin import lively

FAMILIES = ["swinv2", "swin", "swin_mlp", "swin_moe"]
SIZE = (30, 41)
BATCH = ({0: Dim("batch")},)
DENSE = {"depths": [2, 1], "num_heads": [1, 1], "embed_dim": 16}
MIXED = {"depths": [1], "num_heads": [1], "embed_dim": 16}
ROUTINGS = {
    "dropless": {"top_k": 2},
    "capacity of an image": {"route_per_image": True, "eval_capacity_factor": 0.5},
    "expert_choice": {"routing": "expert_choice"},
    "soft": {"routing": "soft"},
}


def mixture(**settings):
    return lively(moe=MoEConfig(blocks=[[0]], num_experts=3, **settings), **MIXED)


def images(count, size=SIZE):
    return torch.randn(count, 3, *size)


@cache
@torch.no_grad()
def exported(family):
    model = lively(family, **DENSE)
    return model, torch.export.export(model, (images(2),), dynamic_shapes=BATCH)


@torch.no_grad()
def check(model, run, count=5):
    x = images(count)
    outputs = model(x)
    expected = outputs.predictions if outputs.routing is None else outputs
    for ours, theirs in zip(tree_leaves(expected), tree_leaves(run(x)), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def check_export(model, program):
    assert "swin_moe." not in str(program.graph)
    check(model, program.module())
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(images(2, (32, 48)))


@torch.no_grad()
def check_trace(model):
    traced = torch.jit.trace(model, images(1), strict=False)
    assert "swin_moe::" not in str(traced.inlined_graph)
    check(model, traced)
    with pytest.raises(torch.jit.Error, match="30 x 41 pixels, called with 32 x 48: trace the"):
        traced(images(1, (32, 48)))
    return traced


@torch.no_grad()
def check_onnx(model, source, path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    options = {"dynamo": True, "verbose": False}
    torch.onnx.export(source, (images(2),), path, dynamic_shapes=BATCH, **options)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for count in (1, 5):
        check(model, lambda x: [*map(torch.tensor, session.run(None, {name: x.numpy()}))], count)
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {name: images(2, (32, 48)).numpy()})


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_equals_eager(family):
    check_export(*exported(family))


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.long) for name in FAMILIES[1:])]
)
def test_onnx_equals_eager(family, tmp_path):
    check_onnx(*exported(family), tmp_path / "model.onnx")


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_traced_equals_eager(family):
    check_trace(lively(family, **DENSE))


@torch.no_grad()
def test_a_trace_follows_its_weights():
    """An evaluation keeps the position bias, which a trace must not take for a constant."""
    model, other = lively(**MIXED), lively(**MIXED)
    model(images(1))
    for parameter in other.parameters():
        parameter.mul_(1.1)
    traced = check_trace(model)
    traced.load_state_dict(other.state_dict(), strict=False)  # the trace has all buffers
    check(other, traced)


@pytest.mark.parametrize("routing", ["dropless", "capacity of an image", "soft"])
@torch.no_grad()
def test_a_mixture_exported_and_traced_equals_eager(routing):
    model = mixture(**ROUTINGS[routing])
    check_trace(model)
    check_export(model, torch.export.export(model, (images(2),), dynamic_shapes=BATCH))


@pytest.mark.parametrize(
    "routing", ["capacity of an image", pytest.param("expert_choice", marks=pytest.mark.long)]
)
@torch.no_grad()
def test_a_mixture_in_onnx_equals_eager(routing, tmp_path):
    """With a router that is all zeros, as upcycling makes it: equal scores keep their order."""
    model = mixture(batch_prioritized=True, **ROUTINGS[routing])
    model.layers[0].blocks[0].mlp.router.weight.zero_()
    check_onnx(model, model, tmp_path / "model.onnx")


@torch.no_grad()
def test_what_depends_on_the_batch_is_refused(tmp_path):
    model = mixture(eval_capacity_factor=1.0)
    words = "moe.eval_capacity_factor=0 or moe.route_per_image=true"
    with pytest.raises(ValueError, match=words):
        torch.jit.trace(model, images(1), strict=False)
    with pytest.raises(ValueError, match=words):
        torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    check(model, torch.export.export(model, (images(5),)).module())  # a fixed number


@torch.no_grad()
def test_what_cannot_leave_is_refused(tmp_path, monkeypatch):
    model = mixture()
    with pytest.raises(ValueError, match="dynamo=True"):
        torch.onnx.export(model, (images(1),), tmp_path / "model.onnx", dynamo=False)
    sides = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    with pytest.raises(Exception, match="images of one size: leave height and width out"):
        torch.onnx.export(
            lively(**MIXED), (images(1),), tmp_path / "model.onnx", dynamo=True,
            dynamic_shapes=sides, verbose=False,
        )  # fmt: skip
    monkeypatch.setattr(model.layers[0].blocks[0].mlp, "group", SimpleNamespace(size=2))
    with pytest.raises(ValueError, match="spread over 2 processes"):
        torch.jit.trace(model, images(1), strict=False)
