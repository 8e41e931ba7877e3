"""Swin V2 equals the official implementation, in every intermediate tensor and in training."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe.config import ModelConfig
from swin_moe.models import SwinTransformer
from swin_moe.optim import parameter_groups
from tests.golden import Golden

BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask")


def load(golden: Golden) -> SwinTransformer:
    model = SwinTransformer(ModelConfig(**golden.config["arguments"]))
    state = {k: v for k, v in golden.weights.items() if not k.endswith(BUFFERS)}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("name", ["swinv2_w8", "swinv2_w4", "swinv2_w8_pretrained"])
@torch.no_grad()
def test_forward_equals_official(name):
    golden = Golden(name)
    model = load(golden).eval()
    images = golden.io["input"]
    golden.check("patch_embed", model.patch_embed(images).flatten(1, 2))
    x = model.embed(images)
    for index, layer in enumerate(model.layers):
        for block in layer.blocks:
            x, _ = block(x)
        if layer.downsample is not None:
            golden.check(f"stage{index}.blocks", x.flatten(1, 2))
            x = layer.downsample(x)
        golden.check(f"stage{index}", x.flatten(1, 2))
    x = model.norm(x)
    golden.check("norm", x.flatten(1, 2))
    golden.check("pooled", x.mean((1, 2)))
    golden.check("logits", model(images))


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
        loss = F.cross_entropy(model(golden.io["input"]), golden.io["labels"])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad_norm"]))
        optimizer.step()
        losses.append(loss.detach())
    golden.check("loss", torch.stack(losses))
    golden.check("grad_norm", torch.stack(norms))
    golden.check("final_logits", model(golden.io["input"]))
    parameters = dict(model.named_parameters())
    for name in golden.io:
        if name.startswith("final."):
            golden.check(name, parameters[name.removeprefix("final.")])
