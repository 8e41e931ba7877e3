"""A model that is built module by module has the weights of one that is built at once."""

from functools import partial

import pytest
import torch

from swin_moe.config import Config, ModelConfig, MoEConfig, SimMIMConfig
from swin_moe.models import SwinTransformer
from swin_moe.models.sharded_init import build_in_parts
from swin_moe.tasks import build_task
from tests.parallel import run_worker

MODEL = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 16, "depths": [2, 3],
         "num_heads": [2, 4], "window_size": 4, "ape": True}  # fmt: skip
MOE = {"blocks": [[1], [0, 2]], "num_experts": 4}
CASES = {
    "swin": ("swin", None),
    "swinv2": ("swinv2", None),
    "swin_mlp": ("swin_mlp", None),
    "linear router": ("swinv2", {"num_shared_experts": 1}),
    "cosine router": ("swin_moe", {"router": "cosine"}),
    "soft": ("swinv2", {"routing": "soft"}),
    "simmim": ("swinv2", {}),
}


def simmim(model, moe, *, initialise=True):
    config = Config(model=model, moe=moe, task=SimMIMConfig())
    return build_task(config).build_model(initialise=initialise)


def making(case):
    return simmim if case == "simmim" else SwinTransformer


@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_and_the_same_draws(case):
    family, moe = CASES[case]
    classes = 0 if case == "simmim" else 5
    model = ModelConfig(**{**MODEL, "num_classes": classes}, family=family)
    mixture = MoEConfig(**MOE, **moe) if moe is not None else MoEConfig()
    torch.manual_seed(0)
    whole = making(case)(model, mixture)
    after = torch.rand(3)
    taken, alive = {}, []

    def fill(name, parameter):
        alive.append(parameter.numel())
        taken[name] = parameter.detach().clone()
        if name.endswith("layers.1.blocks.0.norm1.bias"):
            parameter.data.fill_(7)

    def take(parameters):
        alive.clear()
        for parameter in parameters:
            kept.append(parameter.detach().clone())
            parameter.data = torch.empty(0)

    kept: list[torch.Tensor] = []
    torch.manual_seed(0)
    parts = build_in_parts(partial(making(case), model, mixture, initialise=False), take, fill)
    assert torch.rand(3).equal(after)
    expected = dict(whole.named_parameters())
    assert list(dict(parts.named_parameters())) == list(expected)
    assert taken.keys() == expected.keys()
    assert all(taken[name].equal(value) for name, value in expected.items())
    assert all(parameter.numel() == 0 for parameter in parts.parameters())
    for name, buffer in whole.named_buffers():
        assert buffer.equal(dict(parts.named_buffers())[name])
    assert any((tensor == 7).all() for tensor in kept)  # what was filled in is what is taken


@pytest.mark.parametrize("processes", [1, 2])
def test_zero_3_trains_the_same(tmp_path, processes):
    run_worker("parts", tmp_path, processes)
    assert (tmp_path / "passed").exists()
