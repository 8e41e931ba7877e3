"""torch.compile: one graph that computes what eager mode does, and few of them for many sizes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.models.test_swin import lively

# As little as shows shifted windows and patch merging: compiling takes long.
ONE_STAGE = {"depths": [2], "num_heads": [1], "embed_dim": 16}  # a head that the kernels know
TWO_STAGES = {"depths": [2, 1]}
CASES = [
    ("swinv2", "inductor", ONE_STAGE),
    ("swin", "aot_eager", TWO_STAGES),
    ("swin_mlp", "aot_eager", TWO_STAGES),
    ("swin_moe", "aot_eager", TWO_STAGES),
]


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, run, images):
    model.zero_grad()
    logits = run(images).predictions
    logits.square().sum().backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("error:.*lru_cache")
@pytest.mark.parametrize(("family", "backend", "shape"), CASES)
def test_compiled_equals_eager(family, backend, shape):
    model = lively(family, **shape).train()
    images = torch.randn(2, 3, 30, 41)
    logits, expected = gradients(model, model, images)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled_logits, actual = gradients(model, compiled, images)
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-4, atol=1e-4)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1)
        torch.testing.assert_close(actual[name] / scale, gradient / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("error:.*lru_cache")
@pytest.mark.parametrize(
    ("family", "shape", "graphs"),
    [
        ("swinv2", ONE_STAGE, 3),
        pytest.param("swin_mlp", TWO_STAGES, 4, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_one_compiled_model_for_all_sizes(family, shape, graphs):
    """A graph each for sizes that patches divide, for others and for clipped windows.

    SwinMLP has one more, for maps that its windows divide. The time is the C++ compiler's.
    """
    model = lively(family, **shape)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    divided, others = [(48, 32), (64, 80), (96, 48), (32, 72)], [(30, 41), (50, 33), (22, 57)]
    for size in [*divided, *others, (6, 64)]:
        images = torch.randn(4, 3, *size)
        torch.testing.assert_close(compiled(images)[0], model(images)[0], rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= graphs
