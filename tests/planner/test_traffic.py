"""Predicted bytes of each collective equal those that two processes pass to gloo."""

import json
from typing import Any

from swin_moe.common.hardware import Cluster
from swin_moe.config import validate
from swin_moe.planner.choices import Planner
from tests.parallel import run_worker

MODEL = {"name": "swinv2", "img_size": 32, "num_classes": 10, "embed_dim": 64, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4}  # fmt: skip
# The capacity holds every token, so that the messages do not depend on the router.
MOE = {"blocks": [[], [1]], "num_experts": 4, "capacity_factor": 4.0}


# Stage, precision, expert-parallel size, micro-steps. ZeRO-3 changes torch for good: it comes last.
CASES = [(0, "fp32", 1, 1), (1, "bf16", 1, 2), (2, "fp32", 2, 2), (1, "fp32", 2, 1),
         (3, "fp32", 1, 2), (3, "bf16", 1, 1)]  # fmt: skip


def _config(stage: int, dtype: str, group: int, steps: int) -> dict[str, Any]:
    return {
        "model": {**MODEL, "embed_dim": 128, "num_heads": [4, 8]} if stage == 3 else MODEL,
        "moe": MOE,
        "data": {"batch_size": 4},
        "augment": {"mixup": 0.0, "cutmix": 0.0},
        "zero": {"stage": stage},
        "precision": {"dtype": dtype},
        "parallel": {"expert_parallel_size": group},
        "train": {"gradient_accumulation_steps": steps},
    }


def test_bytes_equal_those_passed_to_gloo(tmp_path):
    configs = [_config(*case) for case in CASES]
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    run_worker("traffic", tmp_path, 2)
    counted = json.loads((tmp_path / "sent.json").read_text())
    for case, raw, sent in zip(CASES, configs, counted, strict=True):
        planner = Planner(validate(raw), Cluster("cpu", 1, 2), fused=True)
        expected: dict[str, int] = {}
        for message in planner.messages(planner.configured()):
            expected[message.kind] = expected.get(message.kind, 0) + message.sent
        assert sent == expected, case
