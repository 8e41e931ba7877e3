"""Predicted bytes of each collective equal those that two processes hand to gloo."""

import json

import pytest

from swin_moe.config import validate
from swin_moe.planner.choices import Planner
from swin_moe.planner.hardware import Cluster
from tests.parallel import run_worker

MODEL = {"name": "swinv2", "img_size": 32, "num_classes": 10, "embed_dim": 64, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4}  # fmt: skip
# Places enough for every choice, so that what travels does not depend on the router.
MOE = {"blocks": [[], [1]], "num_experts": 4, "capacity_factor": 4.0}


@pytest.mark.parametrize(
    ("stage", "dtype", "group", "steps"),
    [(0, "fp32", 1, 1), (1, "bf16", 1, 2), (2, "fp32", 2, 2), (3, "fp32", 1, 2), (3, "bf16", 1, 1)],
)
def test_bytes_are_those_handed_to_gloo(stage, dtype, group, steps, tmp_path):
    model = {**MODEL, "embed_dim": 128, "num_heads": [4, 8]} if stage == 3 else MODEL
    raw = {
        "model": model,
        "moe": MOE,
        "data": {"batch_size": 4},
        "augment": {"mixup": 0.0, "cutmix": 0.0},
        "zero": {"stage": stage},
        "precision": {"dtype": dtype},
        "parallel": {"expert_parallel_size": group},
        "train": {"accumulation_steps": steps},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    run_worker("traffic", tmp_path, 2)
    sent = json.loads((tmp_path / "sent.json").read_text())
    planner = Planner(validate(raw), Cluster("cpu", 1, 2), fused=True)
    expected: dict[str, int] = {}
    for message in planner.messages(planner.asked()):
        expected[message.kind] = expected.get(message.kind, 0) + message.sent
    assert sent == expected
