"""Routing rules, kernels and references, precision, and expert parallelism of the MoE layer."""

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe import MoELayer, build_moe
from swin_moe.moe.balance import importance_load_loss
from swin_moe.moe.plan import KERNELS, RouteContext, expert_capacity
from swin_moe.moe.token_choice import route
from swin_moe.ops import assume_fused
from tests.parallel import run_worker
from tests.workers.moe_layer import cases


def make(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, **settings)
    layer = build_moe(8, 16, moe)
    layer.experts.reset_parameters(0.3)
    return layer.to(dtype)


@pytest.mark.parametrize("processes", [2, 4])
def test_expert_parallel_equals_one_process_in_fp64(tmp_path, processes):
    run_worker("moe_layer", tmp_path, processes)
    assert int((tmp_path / "passed").read_text()) == 2 * len(cases(processes))


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice", "soft"])
def test_a_layer_alone_has_weights(routing):
    layer = build_moe(8, 16, MoEConfig(num_experts=4, routing=routing, init_std=0.1))
    for linear in (layer.experts.fc1, layer.experts.fc2):
        assert 0.05 < linear.weight.std() < 0.15
        assert not linear.bias.any()


def evaluate(logits, moe):
    return route(logits, moe, RouteContext(KERNELS, training=False)).plan


def test_capacity_rule():
    assert expert_capacity(98, 4, 1, 1.25) == 31
    assert expert_capacity(98, 4, 2, 1.0) == 50
    assert expert_capacity(98, 4, 2, 0.0) == 0
    assert expert_capacity(2, 64, 1, 0.5) == 1  # at least one


def test_ties_go_to_the_lower_index():
    moe = MoEConfig(num_experts=4, top_k=2, eval_capacity_factor=1.0)
    plan = evaluate(torch.zeros(8, 4), moe)
    assert plan.expert.tolist() == [[0, 1]] * 8
    assert plan.slot[:, 0].tolist() == list(range(8))
    assert plan.kept.sum(0).tolist() == [4, 4]


@pytest.mark.parametrize("fused", [True, False])
def test_dropped_tokens_give_zero_and_are_counted(fused):
    layer = make(eval_capacity_factor=0.25).eval()
    with assume_fused(fused):
        result = layer(torch.randn(64, 8))
    silent = (result.output == 0).all(1)
    assert 0 < result.stats.dropped.item() == silent.sum().item()
    assert result.stats.counts.sum() == 64


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_kernels_agree_with_references(factor):
    x = torch.randn(2, 7, 8)
    results = []
    for fused in (True, False):
        layer = make(capacity_factor=factor, top_k=2)
        torch.manual_seed(3)  # the gate noise
        leaf = x.clone().requires_grad_()
        with assume_fused(fused):
            result = layer(leaf)
            (result.output.square().sum() + result.aux_loss).backward()
        results.append([*result[:2], *result[2], leaf.grad, *[p.grad for p in layer.parameters()]])
    for fused, reference in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference)


def test_gradcheck_in_fp64():
    layer = make(torch.float64, top_k=2, eval_capacity_factor=1.0).eval()
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t)[:2], x)


def test_bf16_routes_in_fp32_and_returns_bf16():
    layer = make(torch.bfloat16).eval()
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    result = layer(x)
    assert result.output.dtype == torch.bfloat16
    assert result.aux_loss.dtype == torch.float32
    wide = make(torch.float32).eval()
    wide.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    expected = wide(x.float())
    assert torch.equal(result.stats.counts, expected.stats.counts)
    torch.testing.assert_close(result.output.float(), expected.output, rtol=5e-2, atol=5e-2)


def test_autocast_keeps_routing_in_fp32():
    layer = make().eval()
    x = torch.randn(64, 8)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
    assert torch.equal(result.stats.counts, expected.stats.counts)
    torch.testing.assert_close(result.aux_loss, expected.aux_loss)
    assert result.output.dtype == torch.float32


def test_no_tokens():
    layer = make(eval_capacity_factor=0.0).eval()
    result = layer(torch.randn(0, 8))
    assert result.output.shape == (0, 8)
    assert result.stats.counts.sum() == 0
    assert result.aux_loss == 0


def test_balance_has_finite_gradients_at_perfect_balance():
    sums = torch.full((2, 4), 2.0, requires_grad=True)
    loss = importance_load_loss(*sums)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert sums.grad.isfinite().all()


def test_experts_must_divide():
    from swin_moe.distributed import Group

    with pytest.raises(ValueError, match=r"moe.num_experts=5 .* 2 ranks"):
        MoELayer(8, 16, MoEConfig(num_experts=5), Group(None, 0, 2))


def test_shards_must_divide_the_widths():
    from swin_moe.distributed import Group

    moe = MoEConfig(num_experts=2)
    with pytest.raises(
        ValueError, match=r"expert_parallel_size=6 .*num_experts=2 in 3, .* 8 .* 18"
    ):
        MoELayer(8, 18, moe, Group(None, 1, 6))


def test_initial_shards_are_parts_of_whole_experts():
    from swin_moe.distributed import Group

    whole = make()
    for rank in range(8):
        torch.manual_seed(0)
        part = MoELayer(8, 16, MoEConfig(num_experts=4), Group(None, rank, 8))
        part.experts.reset_parameters(0.3)
        expert, half = slice(rank // 2, rank // 2 + 1), rank % 2
        fc1, fc2 = whole.experts.fc1, whole.experts.fc2
        assert torch.equal(part.experts.fc1.weight, fc1.weight[expert].chunk(2, 1)[half])
        assert torch.equal(part.experts.fc2.weight, fc2.weight[expert].chunk(2, 2)[half])
        assert part.experts.fc1.bias.shape == (1, 8)
        assert part.experts.fc2.bias.shape == (1, 4)


def test_initial_experts_do_not_depend_on_the_expert_group():
    from swin_moe.distributed import Group

    whole = make()
    torch.manual_seed(0)
    part = MoELayer(8, 16, MoEConfig(num_experts=4), Group(None, 1, 2))
    part.experts.reset_parameters(0.3)
    assert torch.equal(part.experts.fc1.weight, whole.experts.fc1.weight[2:])
    assert torch.equal(part.experts.fc2.weight, whole.experts.fc2.weight[2:])


def test_a_normalised_top1_gate_is_one_and_still_teaches_the_router():
    logits = torch.randn(12, 4, requires_grad=True)
    moe = MoEConfig(num_experts=4, normalize_gate=True, balance="gshard", gate_noise=0.0)
    plan = route(logits, moe, RouteContext(KERNELS)).plan
    assert torch.equal(plan.gate.detach(), torch.ones(12, 1))
    (gradient,) = torch.autograd.grad(plan.gate.sum(), logits)
    log_probability = logits.log_softmax(1).gather(1, plan.expert)
    (expected,) = torch.autograd.grad(log_probability.sum(), logits)
    torch.testing.assert_close(gradient, expected)
