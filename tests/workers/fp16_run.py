"""The program in fp16 with another loss scale; ``spec.json`` has it and the arguments."""

import json
from pathlib import Path

import torch

from swin_moe.cli import main
from swin_moe.common import ranks
from tests.workers.equivalence import run_fp16_anywhere


def work(folder: Path) -> None:
    from swin_moe.training import loss_scale

    spec = json.loads((folder / "spec.json").read_text())
    run_fp16_anywhere()
    torch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: True
    for name, value in spec["loss_scale"].items():
        setattr(loss_scale, name, value)
    ranks.leave(main.main(spec["arguments"]))
