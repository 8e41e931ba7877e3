"""The family equals the official implementations in every intermediate tensor and in training."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import SwinTransformer
from swin_moe.moe import moe_layers
from swin_moe.moe.plan import RouteContext
from swin_moe.moe.token_choice import route
from swin_moe.training.optim import parameter_groups
from tests.golden import Golden

BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask")
FAMILY = {"swin_v1_w7": "swin", "swin_mlp": "swin_mlp", "swin_moe_official": "swin_moe",
          "swin_moe_official_cosine": "swin_moe"}  # fmt: skip
DENSE = ["swinv2_w8", "swinv2_w4", "swinv2_w8_pretrained", "swin_v1_w7", "swin_mlp"]
MOE = ["swin_moe_official", "swin_moe_official_cosine"]
# Official constructor argument -> key of the section moe
MOE_ARGUMENTS = {
    "num_local_experts": "num_experts", "top_value": "top_k", "capacity_factor": "capacity_factor",
    "normalize_gate": "normalize_gate", "use_bpr": "batch_prioritized", "gate_noise": "gate_noise",
    "aux_loss_weight": "aux_loss_weight", "moe_drop": "drop_rate", "mlp_fc2_bias": "fc2_bias",
    "cosine_router_dim": "cosine_router_dim", "cosine_router_init_t": "cosine_router_init_t",
}  # fmt: skip
MOE_NAMES = {
    "experts.fc1.weight": "experts.batched_fc1_w",
    "experts.fc1.bias": "experts.batched_fc1_bias",
    "experts.fc2.weight": "experts.batched_fc2_w",
    "experts.fc2.bias": "experts.batched_fc2_bias",
    "router.weight": "gates.0.wg.weight",
    "router.": "gates.0.",
}


def configs(golden: Golden) -> tuple[ModelConfig, MoEConfig]:
    arguments = dict(golden.config["arguments"])
    moe = {}
    if "moe_blocks" in arguments:
        blocks = [[b for b in stage if b >= 0] for stage in arguments.pop("moe_blocks")]
        moe = {"blocks": blocks, "init_std": arguments["init_std"]}
        moe["router"] = "cosine" if arguments.pop("cosine_router") else "linear"
        moe["eval_capacity_factor"] = arguments["capacity_factor"]
        for theirs, ours in MOE_ARGUMENTS.items():
            keep = theirs == "mlp_fc2_bias"
            if theirs in arguments:
                moe[ours] = arguments[theirs] if keep else arguments.pop(theirs)
    family = FAMILY.get(golden.config["fixture"], "swinv2")
    return ModelConfig(family=family, **arguments), MoEConfig(**moe)


def load(golden: Golden, **moe_overrides: object) -> SwinTransformer:
    model_config, moe = configs(golden)
    model = SwinTransformer(model_config, moe.model_copy(update=moe_overrides))
    theirs = {k: v for k, v in golden.weights.items() if not k.endswith(BUFFERS)}
    state = {}
    for name in model.state_dict():
        official = name
        if name not in theirs:
            ours, other = next((o, t) for o, t in MOE_NAMES.items() if f".mlp.{o}" in name)
            official = name.replace(f".mlp.{ours}", f".mlp._moe_layer.{other}")
        tensor = theirs.pop(official)
        state[name] = tensor.transpose(1, 2) if official.endswith("batched_fc2_w") else tensor
    left = {name for name in theirs if not name.endswith(("_num_global_experts", "fc2_bias"))}
    assert not left
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("name", DENSE + MOE)
@torch.no_grad()
def test_forward_equals_official(name):
    golden = Golden(name)
    model = load(golden).eval()
    images = golden.io["input"]
    golden.check("patch_embed", model.patch_embed(images).flatten(1, 2))
    x = model.embed(images)
    for index, layer in enumerate(model.layers):
        x, _ = layer.forward_blocks(x)
        if layer.downsample is not None:
            golden.check(f"stage{index}.blocks", x.flatten(1, 2))
            x = layer.downsample(x)
        golden.check(f"stage{index}", x.flatten(1, 2))
    x = model.norm(x)
    golden.check("norm", x.flatten(1, 2))
    golden.check("pooled", x.mean((1, 2)))
    output = model(images)
    golden.check("logits", output.predictions)


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("balance", ["gshard", "importance_load"])
@torch.no_grad()
def test_routing_equals_official(name, balance):
    """Experts, slots and what is dropped exactly; gates and both balance losses within rounding."""
    golden = Golden(name)
    model = load(golden, balance=balance).eval()
    seen = {}
    for layer_name in moe_layers(model):
        layer = model.get_submodule(f"{layer_name}.mlp")
        layer.register_forward_hook(
            lambda _, args, result, n=layer_name: seen.update({n: (args[0], result)})
        )
    output = model(golden.io["input"])
    suffix = "gshard" if balance == "gshard" else "load_importance"
    golden.check(f"l_aux.{suffix}", output.aux_loss.view(1))
    weight = model.moe.aux_loss_weight
    for layer_name, (tokens, result) in seen.items():
        prefix = f"{layer_name}.moe"
        golden.check(f"{prefix}.input", tokens.flatten(1, 2))
        golden.check(f"{prefix}.output", result.output.flatten(1, 2))
        golden.check(f"{prefix}.l_aux.{suffix}", result.aux_loss.view(1) / weight)
        layer = model.get_submodule(f"{layer_name}.mlp")
        logits = layer.router(tokens.flatten(0, 2))
        golden.check(f"{prefix}.scores", logits.softmax(1))
        plan = route(logits, layer.moe, RouteContext(layer.kernels, training=False)).plan
        capacity = plan.capacity or int(plan.counts.max())
        assert capacity == golden.io[f"{prefix}.capacity"].item()
        for field in ("expert", "gate", "slot", "kept"):
            golden.check(f"{prefix}.{field}", getattr(plan, field))


def test_training_trajectory_equals_official():
    golden = Golden("train_trajectory_swinv2")
    recipe = golden.config["training"]
    model = load(golden).train()
    groups = parameter_groups(model, recipe["weight_decay"])
    no_decay = {
        name for name, p in model.named_parameters()
        if any(p is q for group in groups if group["weight_decay"] == 0 for q in group["params"])
    }  # fmt: skip
    assert no_decay == set(golden.config["no_decay_parameters"])
    optimizer = torch.optim.AdamW(
        groups, lr=recipe["lr"], betas=tuple(recipe["betas"]), eps=recipe["eps"]
    )
    losses, norms = [], []
    for _ in range(recipe["steps"]):
        loss = F.cross_entropy(model(golden.io["input"]).predictions, golden.io["labels"])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad_norm"]))
        optimizer.step()
        losses.append(loss.detach())
    golden.check("loss", torch.stack(losses))
    golden.check("grad_norm", torch.stack(norms))
    golden.check("final_logits", model(golden.io["input"]).predictions)
    parameters = dict(model.named_parameters())
    for name in golden.io:
        if name.startswith("final."):
            golden.check(name, parameters[name.removeprefix("final.")])
