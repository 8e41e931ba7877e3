"""The closed formulas equal torch's count on the real model with reference ops."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swin_moe import ops
from swin_moe.config import validate_architecture
from swin_moe.models import build
from swin_moe.planner.flops import flops

SMALL = {"img_size": 32, "num_classes": 5, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2],
         "window_size": 4}  # fmt: skip
MOE = {"blocks": [[], [1]], "num_experts": 4}
CASES = {
    "v2": ({"family": "swinv2"}, {}),
    "v1": ({"family": "swin"}, {}),
    "swin_moe": ({"family": "swin_moe"}, {}),
    "rectangular": ({"family": "swinv2", "img_size": [32, 48]}, {}),
    "padded windows": ({"family": "swinv2", "img_size": [36, 44]}, {}),
    "clipped windows": ({"family": "swinv2", "window_size": 16}, {}),
    "top-1 with capacity": ({"family": "swinv2"}, MOE),
    "top-2 with capacity": ({"family": "swin_moe"}, {**MOE, "top_k": 2, "capacity_factor": 0.7}),
    "cosine, shared": (
        {"family": "swinv2"},
        {**MOE, "router": "cosine", "num_shared_experts": 1},
    ),
    "expert choice": ({"family": "swinv2"}, {**MOE, "routing": "expert_choice"}),
    "soft": ({"family": "swinv2"}, {**MOE, "routing": "soft"}),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_equal_torch_s_count(name):
    model, moe = CASES[name]
    config = validate_architecture(
        {"model": {**SMALL, **model, "name": model["family"]}, "moe": moe}, source=name
    )
    torch.manual_seed(0)
    built = build(config.model, config.moe).train()
    images = torch.randn(2, 3, *config.model.image_sides)
    with ops.assume_fused(False), FlopCounterMode(display=False) as forward:
        logits, aux_loss, routing = built(images)
    loss = logits.square().mean() + (0.0 if aux_loss is None else aux_loss)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    rows = None
    if routing is not None and config.moe.routing == "token_choice":
        offered, dropped = routing.sums[:, 1], routing.dropped
        rows = [int(kept) for kept in offered - dropped]
    expected = flops(config.model, config.moe, 2, rows)
    assert forward.get_total_flops() == expected.forward
    assert backward.get_total_flops() == expected.backward
