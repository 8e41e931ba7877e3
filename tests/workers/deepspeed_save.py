"""Trains a step and saves it by DeepSpeed, and by our writer."""

from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

from swin_moe import distributed
from swin_moe.config import MoEConfig, OptimizerConfig, ZeroConfig
from swin_moe.models.layers import Mlp
from tests.workers.equivalence import MODEL, batch, write_checkpoint


def save_dense(world, folder: Path, stage: int, dtype: torch.dtype) -> None:
    from swin_moe.models import build
    from swin_moe.training.engine import Engine

    distributed.seed_everything(0)
    engine = Engine(
        build(MODEL, MoEConfig()), world, optimizer=OptimizerConfig(),
        zero=ZeroConfig(stage=stage), dtype=dtype, micro_batch=4, gradient_accumulation_steps=1,
    )  # fmt: skip
    engine.train()
    images, labels = batch(0, world.rank)
    engine.backward(F.cross_entropy(engine.forward({"images": images}).predictions, labels))
    engine.step()
    engine.deepspeed.save_checkpoint(str(folder), client_state={"epoch": 3})
    write_checkpoint(folder.with_name(folder.name + "-ours"), engine, world)
    engine.close()


def save_experts(world, folder: Path) -> None:
    """Save an official Swin (V1) with DeepSpeed's MoE layer instead of one feed-forward."""
    from swin_moe.models import build

    distributed.seed_everything(0)
    deepspeed.ops.__compatible_ops__ = {}  # as the engine: no op is compiled, which takes minutes
    shape = MODEL.model_copy(update={"family": "swin"})
    model = build(shape, MoEConfig())
    block = model.layers[1].blocks[1]
    layer = deepspeed.moe.layer.MoE(16, Mlp(16, 64), num_experts=4, ep_size=2, k=1)
    block.mlp = layer
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        for parameter in expert.parameters():
            parameter.data += 2 * world.expert.rank + index
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), dist_init_required=False,
        config={"train_micro_batch_size_per_gpu": 4},
    )  # fmt: skip
    engine.save_checkpoint(str(folder))
    if world.is_main:
        expert = layer.deepspeed_moe.experts.deepspeed_experts[0]
        torch.save({n: p - 0.0 for n, p in expert.named_parameters()}, folder / "first.pth")
    engine.destroy()


def work(folder: Path) -> None:
    world = distributed.init(expert_parallel_size=2)
    save_experts(world, folder / "experts")
    world = distributed.init()
    for stage in range(4):
        for dtype in (torch.float32, torch.bfloat16):
            save_dense(world, folder / f"{stage}-{str(dtype)[6:]}", stage, dtype)
