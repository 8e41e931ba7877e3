"""fp16 at every ZeRO stage: an overflow changes nothing, and a growing scale loses no gradient."""

from pathlib import Path

import torch

from swin_moe import distributed
from swin_moe.common import ranks
from tests.workers.equivalence import Cell, make_engine, run_fp16_anywhere, train_step
from tests.workers.nonfinite import state_of

PARTS = 4  # micro-batches of an update


def make(world, stage: int):
    accumulation = PARTS // world.size
    cell = Cell(world.size, world.expert.size, stage, "fp16", accumulation)
    engine = make_engine(world, cell)
    engine.train()
    if stage:  # a wrong scale of the gradients must show, which clipping would hide
        engine.deepspeed.optimizer.clip_grad = 0.0
    engine.clip_norm = 0.0
    return engine, cell


def train(engine, world, cell, steps) -> list[float]:
    return [f for s in steps for f in (train_step(engine, world, cell, s), engine.grad_norm())]


def check_overflow(world, stage: int) -> list[float]:
    """Train with and without an overflow before the third update; return the figures."""
    plain, cell = make(world, stage)
    expected = train(plain, world, cell, range(4))
    plain.close()
    engine, cell = make(world, stage)
    figures = train(engine, world, cell, range(2))
    before, scale = state_of(engine), engine.loss_scale.value
    engine.loss_scale.value = 2.0**60
    try:
        train_step(engine, world, cell, 2)
        raise AssertionError("no overflow")
    except FloatingPointError:
        assert engine.loss_scale.value == 2.0**60, "the caller lowers it"
    assert engine.lower_loss_scale()
    assert engine.loss_scale.state() == {"value": 2.0**59, "made": 0}
    for name, value in state_of(engine).items():
        assert torch.equal(value, before[name]), name
    engine.loss_scale.value = scale
    figures += train(engine, world, cell, range(2, 4))
    assert figures == expected, (stage, figures, expected)
    assert engine.loss_scale.made == 2
    engine.close()
    return expected


def check_growth(world, stage: int, expected: list[float]) -> None:
    """Compare a training whose scale doubles after every update with one at a constant scale."""
    from swin_moe.training import loss_scale

    former, loss_scale.WINDOW = loss_scale.WINDOW, 1
    engine, cell = make(world, stage)
    engine.loss_scale.value = 256.0
    figures = train(engine, world, cell, range(4))
    assert engine.loss_scale.value == 4096.0
    engine.close()
    loss_scale.WINDOW = former
    torch.testing.assert_close(
        torch.tensor(figures), torch.tensor(expected), rtol=3e-3, atol=0,
        msg=f"stage {stage}: {figures} {expected}",
    )  # fmt: skip


def work(folder: Path) -> None:
    run_fp16_anywhere()
    size = ranks.environment_rank()[2]
    world = distributed.init(expert_parallel_size=size)
    stages = (0, 1, 2) if size > 1 else (0, 1, 2, 3)
    for stage in stages:
        check_growth(world, stage, check_overflow(world, stage))
    if world.is_main:
        (folder / "passed").write_text(str(len(stages)))
