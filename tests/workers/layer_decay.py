"""Two scheduled updates with layer decay at each ZeRO stage equal AdamW with one rate per layer."""

from pathlib import Path

import torch
import torch.nn.functional as F

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.config import OptimizerConfig, ScheduleConfig, ZeroConfig
from tests.workers.equivalence import MICRO_BATCH, MODEL, MOE, batch

OPTIMIZER = OptimizerConfig(base_lr=0.5, clip_norm=0.2, eps=1e-5, layer_decay=0.8)
SCHEDULE = ScheduleConfig(epochs=10, warmup_epochs=1, warmup_lr=0.1, min_lr=0.01)
# Powers of 0.8: the block of stage 0 and its merging are layer 1, then come stage 1 and the rest
POWERS = {
    "patch_embed.": 4, "layers.0.": 3, "layers.1.blocks.0.": 2, "layers.1.blocks.1.": 1,
    "norm.": 0, "head.": 0,
}  # fmt: skip


def awake(model):
    for parameter in model.parameters():  # block norms start at zero
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
    return model


def loss_of(output, labels):
    return F.cross_entropy(output.predictions, labels) + output.aux_loss


def plain(parts: int, rates: list[float]) -> dict[str, torch.Tensor]:
    """Return the reference: this process alone, with all experts and one group per parameter."""
    from swin_moe.models import build
    from swin_moe.training.optim import decays

    distributed.seed_everything(0)
    model = awake(build(MODEL, MOE)).train()
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "weight_decay": OPTIMIZER.weight_decay if decays(name, parameter) else 0.0,
                "scale": 0.8 ** next(v for k, v in POWERS.items() if name.startswith(k)),
            }
            for name, parameter in model.named_parameters()
        ],
        eps=OPTIMIZER.eps,
    )
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        for part in range(parts):
            images, labels = batch(step, part)
            (loss_of(model(images), labels) / parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
    return dict(model.named_parameters())


def check(world: distributed.World, stage: int) -> None:
    from swin_moe.models import build
    from swin_moe.training.engine import Engine
    from swin_moe.training.optim import build_schedule

    distributed.seed_everything(0)
    engine = Engine(
        awake(build(MODEL, MOE, world.expert)), world, optimizer=OPTIMIZER,
        zero=ZeroConfig(stage=stage), dtype=torch.float32, micro_batch=MICRO_BATCH,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    schedule = build_schedule(engine.optimizer, SCHEDULE, 3, MICRO_BATCH * world.size)
    engine.train()
    share = MICRO_BATCH * world.size / 512
    rates = [
        share * (0.1 + step / 3 * 0.4) for step in range(2)
    ]  # of the warm-up, before the layers' factors
    for step, rate in enumerate(rates):
        schedule.step_update(step)
        assert abs(engine.lr - rate) < 1e-12  # the logged rate
        images, labels = batch(step, world.rank)
        engine.backward(loss_of(engine.forward({"images": images}), labels))
        engine.step()
    expected = plain(world.size, rates)
    local = MOE.num_experts // world.expert.size
    for fragment in engine.fragments():
        name, value = fragment.name, expected[fragment.name]
        if ".experts." in name:
            value = value[world.expert.rank * local :][:local]
        torch.testing.assert_close(
            fragment.values["weight"], value.detach().flatten()[fragment.start : fragment.stop],
            rtol=2e-5, atol=2e-7, msg=lambda text, n=name: f"stage {stage} {n}: {text}",
        )  # fmt: skip
    engine.close()


def work(folder: Path) -> None:
    size = ranks.environment_rank()[2]
    world = distributed.init(expert_parallel_size=size)
    for stage in (0, 1, 2) if size > 1 else (0, 1, 2, 3):
        check(world, stage)
    if world.is_main:
        (folder / "passed").touch()
