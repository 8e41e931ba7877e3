"""Train a few steps at each ZeRO stage on however many processes; write losses, norms, weights.

Fewer processes accumulate over the micro-batches that the others would have, so that all see the
same micro-batches, capacities and queues. Four processes form two expert groups, which replicate
one another's experts, or with half as many experts ("sharded") one, in which two hold each.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from swin_moe import checkpoint, distributed
from swin_moe.config import ModelConfig, MoEConfig, OptimizerConfig, ZeroConfig
from swin_moe.placement import expert_share

PARTS = 4  # micro-batches of one update
STEPS = 3
MICRO_BATCH = 4
MODEL = ModelConfig(
    img_size=16, patch_size=2, in_chans=1, num_classes=5, embed_dim=8, depths=[1, 2],
    num_heads=[1, 2], window_size=4, drop_path_rate=0.0,
)  # fmt: skip
MOE = MoEConfig(
    blocks=[[], [1]], num_experts=4, top_k=2, capacity_factor=0.75, gate_noise=0.0,
    balance="gshard", balance_weight=0.1,
)  # fmt: skip
SHARDED = MOE.model_copy(
    update={"num_experts": 2, "top_k": 1, "overlap_degree": 2, "bias_update_rate": 0.05}
)
# Every step is clipped; eps is large enough that rounding of near-zero gradients does not show.
OPTIMIZER = OptimizerConfig(base_lr=0.5, clip_norm=0.2, eps=1e-5)
# For bf16: at the rate above its rounding sends tokens elsewhere by the third step, and any figure
# may come out; at this one the routes stay, and a bound can be close.
GENTLE = OPTIMIZER.model_copy(update={"base_lr": 0.1})


def batch(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    images = torch.randn(MICRO_BATCH, 1, 16, 16, generator=generator)
    return images, torch.randint(0, 5, (MICRO_BATCH,), generator=generator)


def train(
    world: distributed.World,
    stage: int,
    dtype: torch.dtype,
    folder: Path,
    moe: MoEConfig = MOE,
    optimizer: OptimizerConfig = OPTIMIZER,
) -> None:
    from swin_moe.engine import Engine
    from swin_moe.models import build, expert_parameter_names

    distributed.seed_everything(0)
    model = build(MODEL, moe, world.expert)
    for parameter in model.parameters():  # block norms start at zero: wake every path up
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
    accumulation = PARTS // world.size
    engine = Engine(
        model, world, optimizer=optimizer, zero=ZeroConfig(stage=stage), dtype=dtype,
        micro_batch=MICRO_BATCH, accumulation_steps=accumulation,
    )  # fmt: skip
    engine.train()
    losses, norms = [], []
    for step in range(STEPS):
        total, counts = torch.zeros(()), torch.zeros(1, moe.num_experts)
        for micro in range(accumulation):
            images, labels = batch(step, world.rank * accumulation + micro)
            output = engine.forward(images)
            loss = F.cross_entropy(output.logits, labels) + output.aux_loss
            assert output.stats.dropped.sum() > 0  # the capacity bites
            engine.backward(loss)
            engine.step()
            total += loss.detach()
            counts += output.stats.counts
        model.update_choice_bias(distributed.all_reduce_(counts))
        losses.append(float(distributed.all_reduce_(total)) / PARTS)
        norms.append(engine.grad_norm())
    checkpoint.save(
        folder, STEPS, export=engine.export_state, expert_names=expert_parameter_names(model),
        share=expert_share(moe.num_experts, world.expert.rank, world.expert.size), state={},
        config_text="", world=world,
    )  # fmt: skip
    if world.is_main:
        (folder / "figures.json").write_text(json.dumps({"loss": losses, "norm": norms}))
    engine.close()


def main() -> None:
    size = distributed.environment_rank()[2]
    world = distributed.init(expert_parallel_size=min(size, 2))
    folder = Path(sys.argv[1])
    for stage in (0, 1, 2):
        train(world, stage, torch.float32, folder / f"world{size}-stage{stage}")
        name = f"world{size}-stage{stage}-bf16"
        train(world, stage, torch.bfloat16, folder / name, optimizer=GENTLE)
    if size == 1:
        train(world, 0, torch.float32, folder / "world1-gentle", optimizer=GENTLE)
    if size in (1, 4):
        world = distributed.init(expert_parallel_size=size)
        for stage in (0, 1, 2) if size > 1 else (0,):
            train(world, stage, torch.float32, folder / f"world{size}-sharded{stage}", SHARDED)
    if size > 1:  # ZeRO-3 shards the experts as ordinary parameters: expert parallel size 1
        alone = distributed.Group()
        everyone = distributed.Group(None, world.rank, world.size)
        world = distributed.World(world.rank, 0, size, world.device, alone, everyone)
    train(world, 3, torch.float32, folder / f"world{size}-stage3")
    distributed.shutdown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
