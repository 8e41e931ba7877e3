"""Activation checkpointing changes memory and nothing else."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import SwinTransformer
from swin_moe.models import activation_checkpoint as recompute_module
from swin_moe.models import swin as swin_module
from swin_moe.moe import MoELayer
from swin_moe.ops import assume_fused

MODEL = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 16, "depths": [2, 3],
         "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.3, "drop_rate": 0.1,
         "attn_drop_rate": 0.1}  # fmt: skip
# Noise strong enough to change the routing, and a capacity that drops tokens
MOE = {"blocks": [[1], [0, 2]], "num_experts": 4, "top_k": 2, "capacity_factor": 0.75,
       "gate_noise": 4.0, "drop_rate": 0.1}  # fmt: skip
CASES = {
    "swin": ("swin", None),
    "swinv2": ("swinv2", None),
    "swin_mlp": ("swin_mlp", None),
    "swinv2 moe": ("swinv2", {}),
    "swin_moe cosine": ("swin_moe", {"router": "cosine"}),
    "swinv2 moe dropless": ("swinv2", {"capacity_factor": 0.0, "balance": "gshard"}),
    "swin_moe top-1": ("swin_moe", {"top_k": 1}),
}

WAYS = [True, "offload"]


def build(case, use_checkpoint, only_noise=False):
    """Build a model; ``only_noise``: without dropout and drop path, with gate noise alone."""
    family, moe = CASES[case]
    changes = {key: 0.0 for key in MODEL if key.startswith(("drop", "attn_drop")) and only_noise}
    torch.manual_seed(0)
    config = ModelConfig(**{**MODEL, **changes, "family": family, "use_checkpoint": use_checkpoint})
    if moe is not None:
        moe = MoEConfig(**{**MOE, **moe, **({"drop_rate": 0.0} if only_noise else {})})
    model = SwinTransformer(config, moe)
    for parameter in model.parameters():  # block norms start at zero
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.train()


def step(model):
    """Return the tensors of the output and all gradients of one step, by name."""
    torch.manual_seed(1)
    images, labels = torch.randn(4, 3, 32, 32, requires_grad=True), torch.tensor([0, 1, 2, 3])
    logits, aux_loss, routing = model(images)
    seen = {"logits": logits}
    loss = F.cross_entropy(logits, labels)
    if routing is not None:
        loss = loss + aux_loss
        seen |= {"aux_loss": aux_loss, "dropped": routing.dropped}
        seen |= routing._asdict()
    loss.backward()
    seen["after"] = torch.rand(3)  # the generator's state is the same
    seen |= {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"images.grad": images.grad, **seen}


def differences(one, other):
    assert one.keys() == other.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


@pytest.fixture
def calls(monkeypatch):
    """Count the blocks that are checkpointed."""
    counted = []

    def counting(block, *args, **kwargs):
        counted.append(block)
        return recompute_module.recomputed(block, *args, **kwargs)

    monkeypatch.setattr(swin_module, "recomputed", counting)
    return counted


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_equal_bit_for_bit(case, how, calls):
    plain = step(build(case, False))
    assert not calls
    recomputed = step(build(case, how))
    assert len(calls) == sum(MODEL["depths"])
    assert not differences(plain, recomputed)
    assert all(tensor.isfinite().all() for tensor in plain.values())
    if CASES[case][1] is not None:
        assert plain["counts"].shape == (3, 4)
        assert (plain["dropped"].sum() > 0) == (case != "swinv2 moe dropless")


def test_some_blocks_of_a_stage(calls):
    """The listed number of first blocks of each stage is recomputed; results do not change."""
    plain = step(build("swinv2 moe", False))
    model = build("swinv2 moe", [1, 2])
    assert not differences(plain, step(model))
    chosen = [*model.layers[0].blocks[:1], *model.layers[1].blocks[:2]]
    assert calls == chosen
    kept = [saved_bytes(build("swinv2 moe", how)) for how in (False, [1, 2], True)]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize(
    ("counts", "message"),
    [([1], "has 1 stages, depths has 2"), ([1, 4], r"\[1\]=4, but the stage has 3 blocks")],
)
def test_a_list_that_does_not_fit_the_depths_is_refused(counts, message):
    with pytest.raises(ValueError, match=f"use_checkpoint.*{message}"):
        ModelConfig(**{**MODEL, "use_checkpoint": counts})


@pytest.fixture
def plans(monkeypatch):
    """Record every routing plan, in order."""
    made = []

    def recording(*args, **kwargs):
        routing = original(*args, **kwargs)
        made.append(routing.plan)
        return routing

    original = MoELayer.route
    monkeypatch.setattr(MoELayer, "route", recording)
    return made


DISCRETE = ("expert", "slot", "source", "destination", "counts", "used")


def unlike(plans):
    """Return the fields in which recomputed plans, in reverse order, differ from the first ones."""
    assert len(plans) == 2 * 3
    pairs = list(zip(plans[:3], reversed(plans[3:]), strict=True))
    fields = (*DISCRETE, "gate")
    return {f for f in fields for a, b in pairs if not torch.equal(getattr(a, f), getattr(b, f))}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", [case for case in CASES if "moe" in case])
def test_routing_is_the_same_when_recomputed(case, how, plans):
    step(build(case, how))
    assert not unlike(plans)


def test_autocast_of_the_forward_pass_is_that_of_the_recompute():
    grads = []
    for how in (False, "offload"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model = build("swinv2 moe", how)
            output = model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        (output.predictions.float().square().sum() + output.aux_loss).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert not differences(*grads)


def test_statistics_do_not_keep_the_graph():
    output = build("swinv2 moe", "offload")(torch.randn(4, 3, 32, 32))
    assert output.aux_loss.requires_grad
    assert not any(tensor.requires_grad for tensor in output.routing)


def redrawing(monkeypatch, **options):
    monkeypatch.setattr(
        recompute_module, "checkpoint", partial(checkpoint, preserve_rng_state=False, **options)
    )


def test_a_plan_is_kept_if_the_recompute_draws_other_numbers(monkeypatch, plans):
    """Other numbers in the recompute, such as by a GPU's rounding, never re-route a token."""
    redrawing(monkeypatch)
    with assume_fused(False):
        step(build("swin_moe top-1", True, only_noise=True))
    assert not unlike(plans) & set(DISCRETE)


@pytest.mark.parametrize("only_noise", [False, True])
def test_without_the_kept_plan_routes_differ(only_noise, monkeypatch, plans):
    """The tests above would notice a plan that is not kept."""
    plain = step(build("swin_moe cosine", False, only_noise))
    plans.clear()
    redrawing(monkeypatch)
    monkeypatch.setattr(recompute_module, "keep_routing", noop_context_fn)
    different = differences(plain, step(build("swin_moe cosine", True, only_noise)))
    assert unlike(plans) >= {*DISCRETE[:5], "gate"}
    assert "logits" not in different
    assert "layers.0.blocks.1.mlp.experts.fc1.weight.grad" in different
    assert "patch_embed.proj.weight.grad" in different


def saved_bytes(model):
    """Return the bytes that a forward pass keeps for the backward pass, without weights."""
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(4, 3, 32, 32))
    assert output is not None  # keep it alive, so that addresses are not reused
    return sum(kept.values())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_fewer_activations_are_kept(case, how):
    plain, recomputed = (saved_bytes(build(case, flag)) for flag in (False, how))
    assert recomputed < plain / 4


@pytest.mark.parametrize("how", WAYS)
def test_nothing_is_recomputed_in_evaluation(how, calls):
    model = build("swinv2 moe", how)
    model.eval()(torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        model.train()(torch.randn(1, 3, 32, 32))
    assert not calls


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("case", "blocks"), [("swinv2", 0), ("swinv2 moe", 3)])
def test_only_blocks_with_experts_run_under_modes(case, blocks, how, monkeypatch):
    """A mode is called from Python for every op."""
    modes, calls = [], []

    def kept():
        modes.append(keep_routing())
        return modes[-1]

    def counting(kind):
        dispatch = kind.__torch_dispatch__

        def counted(self, func, *args):
            calls.append(func)
            return dispatch(self, func, *args)

        return counted

    keep_routing = recompute_module.keep_routing
    monkeypatch.setattr(recompute_module, "keep_routing", kept)
    for kind in (recompute_module._Record, recompute_module._Replay):
        monkeypatch.setattr(kind, "__torch_dispatch__", counting(kind))
    step(build(case, how))
    assert len(modes) == blocks
    assert bool(calls) == bool(blocks)


def test_an_offloaded_input_is_copied_without_a_wait(monkeypatch):
    """PyTorch copies to pinned memory, and does not wait, if it is asked not to block."""
    copies = []
    to = torch.Tensor.to

    def noted(tensor, *args, **kwargs):
        if kwargs.get("non_blocking") is not None:
            copies.append((str(args[0]), kwargs["non_blocking"]))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    step(build("swinv2", "offload"))
    assert copies == [("cpu", True)] * 2 * sum(MODEL["depths"])  # there and back
