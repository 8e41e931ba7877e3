"""The MoE layer equals Tutel's in routing, outputs, losses and gradients."""

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe import MoELayer, build_moe
from swin_moe.moe.plan import RouteContext
from swin_moe.moe.router import CosineRouter
from swin_moe.moe.token_choice import route
from swin_moe.ops import assume_fused
from tests.golden import Golden

GOLDEN = Golden("moe_layer_tutel")
BALANCE = {"gshard": "gshard", "load_importance": "importance_load"}
PARAMETERS = {
    "router.weight": "gates.0.wg.weight",
    "router.temperature": "gates.0.temperature",
    "router.cosine_projector.weight": "gates.0.cosine_projector.weight",
    "router.cosine_projector.bias": "gates.0.cosine_projector.bias",
    "router.sim_matrix": "gates.0.sim_matrix",
    "experts.fc1.weight": "experts.batched_fc1_w",
    "experts.fc1.bias": "experts.batched_fc1_bias",
    "experts.fc2.weight": "experts.batched_fc2_w",
    "experts.fc2.bias": "experts.batched_fc2_bias",
}


def official_shape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Transpose Tutel's fc2, [E, hidden, dim], to ours, [E, dim, hidden]."""
    return tensor.transpose(1, 2) if name == "experts.fc2.weight" else tensor


def build(case: str, balance: str) -> MoELayer:
    spec = GOLDEN.config["cases"][case]
    gate = spec["gate_type"]
    moe = MoEConfig(
        num_experts=spec["num_experts"],
        top_k=gate["k"],
        router="cosine" if gate["type"] == "cosine_top" else "linear",
        eval_capacity_factor=float(gate["capacity_factor"]),
        batch_prioritized=spec["batch_prioritized_routing"],
        normalize_gate=spec["normalize_gate"] and spec["gate_type"]["k"] > 1,  # Tutel's rule
        gate_noise=gate["gate_noise"],
        balance=BALANCE[balance],
        aux_loss_weight=1.0,
    )
    layer = build_moe(spec["model_dim"], spec["hidden_size"], moe).eval()
    if moe.router == "cosine":
        layer.router = CosineRouter(
            spec["model_dim"], moe.num_experts, gate["proj_dim"], gate["init_t"]
        )
    state = {}
    for name, _ in layer.named_parameters():
        state[name] = official_shape(name, GOLDEN.weights[f"{case}.{PARAMETERS[name]}"])
    layer.load_state_dict({k: v.reshape_as(layer.state_dict()[k]) for k, v in state.items()})
    return layer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("balance", list(BALANCE))
@pytest.mark.parametrize("case", list(GOLDEN.config["cases"]))
def test_equals_tutel(case, balance, fused):
    layer = build(case, balance)
    x = GOLDEN.io["input"].clone().requires_grad_()
    with assume_fused(fused):
        result = layer(x)

    logits = layer.router(x.view(-1, x.shape[-1]))
    GOLDEN.check(f"{case}.scores", logits.softmax(1))
    plan = route(logits, layer.moe, RouteContext(layer.kernels, training=False)).plan
    for name in ("expert", "slot", "kept", "gate"):
        GOLDEN.check(f"{case}.{name}", getattr(plan, name))
    if plan.capacity:
        assert plan.capacity == GOLDEN.io[f"{case}.capacity"].item()
    assert torch.equal(result.stats.counts, plan.counts)
    assert result.stats.dropped.item() == GOLDEN.config["routing"][case]["dropped"]

    GOLDEN.check(f"{case}.output", result.output)
    GOLDEN.check(f"{case}.l_aux.{balance}", result.aux_loss.view(1))
    (grad,) = torch.autograd.grad(result.aux_loss, x, retain_graph=True)
    GOLDEN.check(f"{case}.grad_input_of_l_aux.{balance}", grad)
    (result.output.square().sum() + result.aux_loss).backward()
    GOLDEN.check(f"{case}.grad_input.{balance}", x.grad)
    for name, parameter in layer.named_parameters():
        official = f"{case}.grad.{PARAMETERS[name]}"
        official += "" if name.startswith("experts") else f".{balance}"
        expected = GOLDEN.io[official]
        GOLDEN.check(official, official_shape(name, parameter.grad).reshape(expected.shape))
