"""Every routing mode: fp64 gradients, kernels and references, its promises, its refusals."""

import pytest
import torch
from torch.autograd import gradcheck

from swin_moe.config import MoEConfig
from swin_moe.moe import build_moe
from swin_moe.moe.balance import ExpertBias
from swin_moe.ops import assume_fused

MODES = {
    "top-1": {},
    "top-1 normalised": {"normalize_gate": True},
    "top-2": {"top_k": 2, "normalize_gate": True},
    "top-3 by index": {"top_k": 3, "batch_prioritized": False},
    "every expert": {"top_k": 4},
    "dropless": {"top_k": 2, "capacity_factor": 0.0},
    "cosine": {"router": "cosine", "cosine_router_dim": 6},
    "sigmoid": {"score": "sigmoid", "balance": "gshard", "top_k": 2},
    "sigmoid normalised": {"score": "sigmoid", "balance": "gshard", "top_k": 2,
                           "normalize_gate": True},
    "gshard and z-loss": {"balance": "gshard", "z_loss_weight": 0.1},
    "no loss but a bias": {"balance": "none", "expert_bias_update_rate": 0.01},
    "per image": {"route_per_image": True, "top_k": 2, "capacity_factor": 0.5},
    "expert choice": {"routing": "expert_choice"},
    "expert choice sigmoid": {"routing": "expert_choice", "score": "sigmoid", "top_k": 2,
                              "z_loss_weight": 0.1},
    "soft": {"routing": "soft", "slots_per_expert": 2},
    "shared expert": {"num_shared_experts": 1},
    "no fc2 bias": {"fc2_bias": False},
    "dropout": {"drop_rate": 0.3},
}  # fmt: skip
APART = ["per image", "expert choice", "expert choice sigmoid", "soft"]


def make(mode, backend="fused", dtype=torch.float32, **more):
    torch.manual_seed(0)
    settings = {"num_experts": 4, "capacity_factor": 0.75, "aux_loss_weight": 0.5, **MODES[mode]}
    layer = build_moe(8, 12, MoEConfig(backend=backend, **{**settings, **more}))
    layer.experts.reset_parameters(0.3)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    if layer.choice_bias is not None:
        layer.choice_bias.rises.copy_(torch.tensor([3, -2, 0, 5]))
    return layer.to(dtype)


def images(dtype=torch.float32, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 8, generator=generator, dtype=torch.float64).to(dtype)


def run(layer, x):
    """Output, loss, statistics and all gradients."""
    torch.manual_seed(2)  # noise and dropout
    leaf = x.clone().requires_grad_()
    result = layer(leaf)
    (result.output.square().sum() + result.aux_loss).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {
        "output": result.output, "aux_loss": result.aux_loss, **result.stats._asdict(),
        "input": leaf.grad, **gradients,
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_reference_in_fp64(mode):
    layer = make(mode, dtype=torch.float64)
    x = images(torch.float64, count=2).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        torch.manual_seed(2)
        result = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return result.output, result.aux_loss

    parameters = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    if mode == "top-1 normalised":  # the router's gradient is not that of the gate, which is one
        parameters = tuple(
            p.requires_grad_(name != "router.weight")
            for name, p in zip(names, parameters, strict=True)
        )
        x = x.detach()
    assert gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_agree_with_references(mode, training):
    results = []
    for fused in (True, False):
        with assume_fused(fused):
            results.append(run(make(mode).train(training), images()))
    for name, value in results[0].items():
        # Sums of large terms round by their size, however small the sum is.
        atol = 2e-5 + 2e-6 * float(value.detach().abs().max())
        torch.testing.assert_close(
            value, results[1][name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("mode", MODES)
def test_no_images(mode):
    result = run(make(mode), torch.randn(0, 3, 4, 8))
    assert result["output"].shape == (0, 3, 4, 8)
    assert result["aux_loss"] == 0
    assert result["sums"].tolist() == [0] * 6
    assert all(result[name].isfinite().all() for name in result if "." in name)


@pytest.mark.parametrize("mode", APART)
def test_other_images_change_nothing(mode):
    layer = make(mode, gate_noise=0.0, balance="gshard")
    x = images()
    alone = torch.cat([layer(image[None]).output for image in x])
    torch.testing.assert_close(layer(x).output, alone)
    assert not torch.equal(make("top-2")(x).output[1], make("top-2")(x[1:2]).output[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_is_not_finite_is_counted_and_not_spread(mode):
    layer = make(mode).eval()
    x = images()
    x[1, 2, 3, 0] = float("nan")
    result = run(layer, x)
    assert result["sums"][3] == 1
    bad = torch.zeros(3, 3, 4, dtype=torch.bool)
    bad[1, 2, 3] = True
    assert result["output"][~bad].isfinite().all()
    assert result["aux_loss"].isfinite()
    if mode != "shared expert":
        assert (result["output"][bad] == 0).all()
    assert result["input"][~bad].isfinite().all()
    assert result["experts.fc1.weight"].isfinite().all()


def test_each_expert_chooses_its_best_tokens():
    layer = make("expert choice", gate_noise=0.0, capacity_factor=1.0).eval()
    x = images()
    plan = layer.route(x.view(-1, 8), groups=3).plan
    scores = layer.router(x.view(-1, 8)).softmax(1).view(3, 12, 4)
    for image in range(3):
        for expert in range(4):
            chosen = plan.kept.view(3, 12, 4)[image, :, expert]
            assert chosen.sum() == plan.capacity == 3
            best = scores[image, :, expert]
            assert best[chosen].min() >= best[~chosen].max()
    assert plan.used.tolist() == [9] * 4
    silent = ~plan.kept.any(1)
    assert (layer(x).output.view(-1, 8)[silent] == 0).all()
    assert layer(x).stats.dropped == silent.sum()


def test_soft_slots_are_convex_combinations():
    layer = make("soft")
    plan = layer.route(images().view(-1, 8), groups=3).plan
    torch.testing.assert_close(plan.into_slots.sum(1), torch.ones(3, 8))
    torch.testing.assert_close(plan.out_of_slots.sum(2), torch.ones(3, 12))
    ones = plan.combine(torch.ones(24, 8), layer.kernels)
    torch.testing.assert_close(ones, torch.ones(36, 8))


def test_evaluation_may_take_other_numbers_of_experts_and_places():
    layer = make("top-2", eval_top_k=3, eval_capacity_factor=0.5)
    tokens = images().view(-1, 8)
    plan = layer.route(tokens).plan
    assert (plan.expert.shape, plan.capacity) == ((36, 2), 12)
    plan = layer.eval().route(tokens).plan
    assert (plan.expert.shape, plan.capacity) == ((36, 3), 12)
    assert layer(images()).stats.sums[1] == 108


def test_a_shared_expert_is_added_for_every_token():
    layer = make("shared expert", eval_capacity_factor=0.25).eval()
    x = images()
    result = layer(x)
    assert result.stats.dropped > 0
    without = result.output - layer.shared(x)
    plan = layer.route(x.view(-1, 8)).plan
    silent = ~plan.kept.any(1)
    torch.testing.assert_close(without.view(-1, 8)[silent], torch.zeros(int(silent.sum()), 8))


def test_bias_moves_the_choice_and_not_the_gate():
    layer = make("no loss but a bias", gate_noise=0.0)
    tokens = images().view(-1, 8)
    before = layer.route(tokens).plan
    layer.choice_bias.rises.copy_(torch.tensor([0, 0, 0, 200]))
    after = layer.route(tokens).plan
    assert (after.expert == 3).all()
    scores = layer.router(tokens).softmax(1)
    torch.testing.assert_close(after.gate, scores[:, 3:])
    assert not torch.equal(before.expert, after.expert)


def test_bias_rises_for_the_idle_and_falls_for_the_busy():
    bias = ExpertBias(4, 0.001)
    bias.update(torch.tensor([10, 2, 4, 0]))
    assert bias.rises.tolist() == [-1, 1, 0, 1]
    bias.to(torch.bfloat16)
    for _ in range(1000):
        bias.update(torch.tensor([10, 2, 4, 0]))
    assert bias.rises.tolist() == [-1001, 1001, 0, 1001]
    assert bias().dtype == torch.float32


def test_bias_evens_the_load():
    torch.manual_seed(0)
    layer = make(
        "no loss but a bias", gate_noise=0.0, capacity_factor=0.0, expert_bias_update_rate=0.001
    )
    tokens = torch.randn(512, 8) + torch.randn(8)
    first = layer.route(tokens).stats.counts
    for _ in range(500):
        layer.choice_bias.update(layer.route(tokens).stats.counts)
    last = layer.route(tokens).stats.counts
    assert last.max() < 0.5 * first.max()
    assert last.max() / 128 < 1.2


def test_losses_are_weighted_and_added():
    x = images()
    parts = {"gate_noise": 0.0, "balance": "gshard"}
    both = make("top-1", **parts, aux_loss_weight=0.5, z_loss_weight=0.25)(x).aux_loss
    balance = make("top-1", **parts, aux_loss_weight=1.0)(x).aux_loss
    z_loss = make("top-1", **parts, aux_loss_weight=0.0, z_loss_weight=1.0)(x).aux_loss
    torch.testing.assert_close(both, 0.5 * balance + 0.25 * z_loss)
    logits = make("top-1").router(x.view(-1, 8))
    torch.testing.assert_close(z_loss, logits.logsumexp(1).square().mean())


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break(mode):
    layer = make(mode, gate_noise=0.0, balance="gshard", drop_rate=0.0)
    if mode == "no loss but a bias":
        layer = make(mode, gate_noise=0.0, drop_rate=0.0)
    x = images()
    expected = run(layer, x)
    layer.zero_grad()
    torch._dynamo.reset()  # each layer is another graph, and their number is limited
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    result = compiled(leaf)
    (result.output.square().sum() + result.aux_loss).backward()
    torch.testing.assert_close(result.output, expected["output"])
    torch.testing.assert_close(result.stats.counts, expected["counts"])
    torch.testing.assert_close(leaf.grad, expected["input"])
    torch.testing.assert_close(layer.experts.fc1.weight.grad, expected["experts.fc1.weight"])


def test_width_must_fit():
    with pytest.raises(ValueError, match="tokens have width 7, the layer has 8"):
        make("top-1")(torch.randn(4, 7))


def test_all_tokens_to_one_expert():
    layer = make("top-1", gate_noise=0.0, balance="gshard", capacity_factor=1.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.arange(4.0)[:, None].expand(4, 8))
    result = layer(images().abs())
    assert result.stats.counts.tolist() == [0, 0, 0, 36]
    assert result.stats.dropped == 27
    gradient = torch.autograd.grad(result.output.sum(), layer.experts.fc1.weight)[0]
    assert (gradient[:3] == 0).all()
    assert gradient[3].abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k=5 is more than num_experts=4"),
        ({"eval_top_k": 5}, "eval_top_k=5 is more than num_experts=4"),
        ({"capacity_factor": -1.0}, "capacity_factor"),
        ({"score": "sigmoid"}, "needs score=softmax"),
        ({"gate_noise": 0.0}, "needs gate_noise > 0"),
        ({"routing": "expert_choice", "capacity_factor": 0.0}, "needs capacity_factor > 0"),
        ({"routing": "soft", "router": "cosine"}, "has a router of its own"),
        ({"routing": "soft", "z_loss_weight": 0.1}, "z_loss_weight has no meaning"),
        (
            {"routing": "expert_choice", "expert_bias_update_rate": 0.1},
            "expert_bias_update_rate has no meaning",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(num_experts=4, **settings)


def test_a_layer_has_one_balance_weight():
    moe = MoEConfig(num_experts=4, blocks=[[1], [0]], aux_loss_weight=[0.1, 0.2])
    assert moe.of_block(1, 0).aux_loss_weight == 0.2
    with pytest.raises(ValueError, match="one weight, not a list"):
        build_moe(8, 12, moe)(images())
