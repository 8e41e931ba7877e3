"""A run settles its kernels at the start: the same on all ranks, one line each."""

import pytest
import torch

from swin_moe import ops
from swin_moe.config import load_config
from swin_moe.ops import Choice, Signature, choice
from swin_moe.tasks import build_task
from swin_moe.training import kernels
from tests.saving import ALONE

RIGHT, WRONG = Choice(True, speedup=2.0), Choice(False, "the kernel left out not finite")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "_trusted", False)
    monkeypatch.setattr(choice, "_required", False)
    monkeypatch.setattr(choice, "_wanted", True)
    monkeypatch.setattr(choice, "try_kernels", lambda keys, say: dict.fromkeys(keys, RIGHT))


def task(*overrides):
    return build_task(load_config("fashion_mnist/swin_moe_micro", list(overrides)))


def test_the_ops_of_the_model_are_tried():
    with torch.device("meta"):
        model = task().build_model(initialise=False)
    found = kernels.model_signatures(model, torch.bfloat16, "cuda")
    assert set(found) == {
        Signature("window_attention", "cuda", "bfloat16", (4, 4, 16)),
        Signature("window_attention", "cuda", "bfloat16", (2, 2, 16)),
        Signature("moe_route", "cuda", "float32"),
        Signature("moe_dispatch", "cuda", "bfloat16"),
        Signature("moe_combine", "cuda", "bfloat16"),
        Signature("moe_experts", "cuda", "bfloat16"),
    }
    on_cpu = kernels.model_signatures(model, torch.float32, "cpu")
    assert Signature("window_attention", "cpu", "float32") in on_cpu
    assert not any(key.shape for key in on_cpu)


def test_a_kernel_runs_only_if_it_runs_on_all_ranks(monkeypatch):
    attention = Signature("window_attention", "cpu", "float32")

    def gather(mine):
        return [mine, {**mine, attention: WRONG}]

    monkeypatch.setattr(kernels, "gather_objects", gather)
    found = kernels.settle(task(), ALONE, torch.float32, print)
    assert str(found[attention]) == "fallback, on rank 1, the kernel left out not finite"
    assert ops.choices("cpu")[attention] == found[attention]
    assert all(c.fused for key, c in found.items() if key != attention)


def test_ranks_agree_on_the_worst_choice_for_each_kernel():
    key, tiles = Signature("moe_experts", "cpu", "float32"), choice.AMX
    slow = Choice(True, "its kernel takes 2.0 times as long", 0.5)
    found = kernels._agree([{key: slow}, {key: WRONG}, {key: RIGHT, tiles: RIGHT}])
    assert found[key] == WRONG._replace(reason="on rank 1, the kernel left out not finite")
    assert found[tiles].reason == "on rank 0, there is no such kernel"


def test_tiles_are_withdrawn_where_a_rank_lacks_them(monkeypatch):
    calls = []
    monkeypatch.setattr(ops._library, "allow_amx", calls.append)
    ops.set_choices({choice.AMX: WRONG})
    assert calls == [False]


def test_an_attention_without_a_kernel_is_named_and_can_be_refused():
    odd = task("model.embed_dim=96", "model.num_heads=[4, 8, 16]")
    found = kernels.settle(odd, ALONE, torch.float32, print)
    (line,) = {str(c) for key, c in found.items() if key.op == "window_attention"}
    assert line.startswith("fallback, no kernel: head widths are 16, 32, 48, 64, windows")
    ops.require_fused("cpu")
    with pytest.raises(ValueError, match=r"ops\.require_fused: window_attention .* no kernel"):
        kernels.settle(odd, ALONE, torch.float32, print)


def test_a_route_to_more_experts_than_a_gpu_kernel_serves_is_named():
    with torch.device("meta"):
        model = task("moe.num_experts=1025").build_model(initialise=False)
    (key,) = kernels.without_kernel(model, torch.bfloat16, "cuda")
    assert (key.op, key.dtype) == ("moe_route", "float32")
    assert not any(
        s.op == "moe_route" for s in kernels.model_signatures(model, torch.bfloat16, "cuda")
    )
    assert not kernels.without_kernel(model, torch.bfloat16, "cpu")
