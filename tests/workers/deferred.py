"""A training imports no compiler and no foreign models; an explicit import works as usual."""

import json
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

HEAVY = ("torch._dynamo.eval_frame", "torch._inductor", "timm.models", "torchvision.ops")


def loaded() -> list[str]:
    return [name for name in HEAVY if name in sys.modules]


def work(folder: Path) -> None:
    from swin_moe.cli import main

    assert main.main(json.loads((folder / "train.json").read_text())) == 0
    assert loaded() == []
    weight = torch.nn.Parameter(torch.ones(3))
    block = torch.nn.Linear(3, 3)
    checkpoint(block, torch.ones(1, 3), use_reentrant=False).sum().backward()
    assert loaded() == []
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    with torch.device("meta"):
        torch.arange(4).mul(2)
    assert loaded() == []

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert torch.compile(double, backend="eager")(torch.ones(1)) == 2
    assert "torch._dynamo.eval_frame" in sys.modules
    # Functions that ran before dynamo was imported are disabled by the first call after that.
    zero_grad = torch.optim.Optimizer.zero_grad
    optimizer.zero_grad()
    assert zero_grad.__wrapped__.__dict__["__dynamo_disable"] is not zero_grad.__wrapped__

    import torchvision
    from torchvision.ops import nms

    assert torchvision.ops.nms is nms
    assert type(torchvision).__name__ == "module"
    assert hasattr(torchvision, "_meta_registrations")
    from timm.layers import DropPath, create_conv2d

    from swin_moe.models.swin import DropPath as ours

    assert callable(create_conv2d)
    assert ours is DropPath
    import timm

    assert timm.create_model("test_vit", num_classes=3).num_classes == 3
    (folder / "passed").touch()
