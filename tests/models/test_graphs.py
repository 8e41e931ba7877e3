"""Graphs of blocks change nothing but time, and few of them serve a whole model."""

from copy import deepcopy

import pytest
import torch
from torch._dynamo import lookup_backend

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import SwinTransformer, graphs
from swin_moe.models.graphs import BlockGraphs

MODEL = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 16, "depths": [1, 4],
         "window_size": 4, "drop_path_rate": 0.3}  # fmt: skip
MOE = {"blocks": [[], [0, 2]], "num_experts": 4, "top_k": 2, "gate_noise": 1.0}


class Backend:
    """A backend that counts graphs and their calls; it runs autograd's part, but no C++."""

    def __init__(self):
        self.made = self.ran = self.dynamic = 0

    def __call__(self, graph, inputs):
        self.made += 1
        self.dynamic += any(isinstance(x, torch.SymInt) for x in inputs)
        run = lookup_backend("aot_eager")(graph, inputs)

        def call(*arguments):
            self.ran += 1
            return run(*arguments)

        return call


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    torch._dynamo.reset()
    backend = Backend()
    monkeypatch.setattr(graphs, "BACKEND", backend)
    yield backend
    torch._dynamo.reset()


def build(family="swinv2", moe=None, **changes):
    torch.manual_seed(0)
    experts = None if moe is None else MoEConfig(**MOE | moe)
    changes = {"num_heads": [1, 2][: len((MODEL | changes)["depths"])]} | changes
    model = SwinTransformer(ModelConfig(family=family, **MODEL | changes), experts)
    for parameter in model.parameters():  # block norms start at zero
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.train()


def images(count=4, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def compiled(model, failures=None):
    found = BlockGraphs(model, (failures if failures is not None else []).append)
    with found.recording():
        model(images())
    found.compile()
    return found


def step(model, images):
    """Return output and gradients of a step with a fixed state of the generator."""
    torch.manual_seed(2)
    model.zero_grad()
    outputs = model(images)
    loss = outputs.predictions.square().sum()
    (loss if outputs.aux_loss is None else loss + outputs.aux_loss).backward()
    seen = {name: parameter.grad for name, parameter in model.named_parameters()}
    return seen | {"logits": outputs.predictions.detach()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1)
        torch.testing.assert_close(
            actual[name] / scale, tensor / scale, rtol=1e-4, atol=1e-5, msg=name
        )


DROPOUTS = {"drop_rate": 0.1, "attn_drop_rate": 0.1}
CASES = {  # family, experts, changes of the model, graphs
    "swinv2": ("swinv2", None, {"depths": [3]}, 3),  # the first block has no drop path
    "recomputed": ("swinv2", None, {"use_checkpoint": True, "depths": [1, 1]} | DROPOUTS, 2),
    "references": ("swinv2", None, {"num_heads": [2], "depths": [1]}, 1),  # narrow heads
    "swin_mlp": ("swin_mlp", None, {"depths": [1]}, 1),
    "swin_moe": ("swin_moe", {}, {}, 4),
    "gate after norm": ("swinv2", {"gate_after_norm": True, "capacity_factor": 0.0}, {}, 4),
    "experts recomputed": ("swin_moe", {}, {"use_checkpoint": True} | DROPOUTS, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_graphs_equal_eager(backend, case):
    family, moe, changes, count = CASES[case]
    model = build(family, moe, **changes)
    names, expected = list(model.state_dict()), step(model, images())
    found = compiled(model)
    assert backend.made == count  # of whole methods: a break in one is an error
    assert backend.dynamic == 0  # stages of other sizes do not make each other's sizes dynamic
    backend.ran = 0
    assert_same(step(model, images()), expected)
    assert backend.made == count
    calls = sum(len(graph.blocks) for graph in found.graphs.values())
    assert backend.ran == (2 * calls if changes.get("use_checkpoint") else calls)
    assert list(model.state_dict()) == names


def test_other_sizes_reuse_graphs(backend):
    model = build(depths=[1])
    sizes = [(4, 32), (3, 32), (2, 32), (5, 32), (6, 32), (1, 32), (4, 48)]
    expected = [step(model, images(*size)) for size in sizes]
    graphs_made = []
    compiled(model)
    for size, tensors in zip(sizes, expected, strict=True):
        assert_same(step(model, images(*size)), tensors)
        graphs_made.append(backend.made)
    assert graphs_made == [1, 2, 2, 2, 2, 3, 4]  # one image and each resolution have their own


def test_evaluation_runs_no_graph_and_keeps_its_bias(backend):
    model = build(depths=[1])
    expected = model.eval()(images())
    model.train()
    compiled(model)
    count = backend.made
    with torch.no_grad():
        assert model.eval()(images())[0].equal(expected[0])
    assert backend.made == count
    assert all(b.attn.evaluated_bias is not None for layer in model.layers for b in layer.blocks)


def test_compiling_changes_neither_weights_nor_gradients():
    model = build("swinv2", {"expert_bias_update_rate": 0.1, "blocks": [[0]]}, depths=[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = compiled(model)
    assert found.speedup() > 0
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    step(deepcopy(model), images())  # with the copy's own blocks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_graph_that_fails_in_training_leaves_the_model_as_it_was(monkeypatch):
    model, failures = build(depths=[1]), []
    expected = step(model, images(3))
    working = graphs.BACKEND

    def backend(graph, inputs):  # fails at the second size, which has a symbol
        if any(isinstance(x, torch.SymInt) for x in inputs):
            raise ValueError("no compiler")
        return working(graph, inputs)

    monkeypatch.setattr(graphs, "BACKEND", backend)
    compiled(model, failures)
    assert_same(step(model, images(3)), expected)
    assert len(failures) == 1
    assert "no compiler" in str(failures[0])
    assert not any("dense" in vars(block) for layer in model.layers for block in layer.blocks)


def test_blocks_that_fairscale_recomputes_have_no_graph():
    model = build(use_checkpoint="offload")
    assert BlockGraphs(model, print).graphs == {}
