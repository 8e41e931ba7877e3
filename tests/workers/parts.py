"""ZeRO-3 trains a model that was cut module by module as one that was built whole."""

from functools import partial
from pathlib import Path

import torch

from swin_moe import distributed
from swin_moe.config import ZeroConfig
from tests.workers.equivalence import DTYPES, GENTLE, MODEL, MOE, Cell, make_engine, train_step


def engine_in_parts(world, cell: Cell):
    from swin_moe.models import SwinTransformer
    from swin_moe.models.sharded_init import build_in_parts
    from swin_moe.training.engine import Engine, cutter

    distributed.seed_everything(0)
    zero = ZeroConfig(stage=3, offload_optimizer=cell.offload)
    dtype = DTYPES[cell.dtype]

    def wake(_name, parameter) -> None:  # as make_engine does
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)

    cut = cutter(zero, world, dtype, largest=10_000)
    whole = partial(SwinTransformer, MODEL, MOE, world.expert, initialise=False)
    model = build_in_parts(whole, cut, wake)
    assert all(parameter.numel() <= 1 for parameter in model.parameters())
    return Engine(
        model, world, optimizer=GENTLE, zero=zero, dtype=dtype, micro_batch=cell.micro_batch,
        gradient_accumulation_steps=cell.accumulation,
    )  # fmt: skip


def work(folder: Path) -> None:
    world = distributed.init()
    for dtype in DTYPES:
        cell = Cell(world.size, 1, 3, dtype, gentle=True)
        figures = []
        for build in (make_engine, engine_in_parts):
            engine = build(world, cell)
            engine.train()
            run = []
            for step in range(3):
                run += [train_step(engine, world, cell, step), engine.grad_norm()]
            parts = {f.name: f.values["weight"].clone() for f in engine.fragments()}
            figures.append((run, parts))
            engine.close()
        (whole, weights), (mine, others) = figures
        assert whole == mine, (dtype, whole, mine)
        assert weights.keys() == others.keys()
        assert all(weights[name].equal(others[name]) for name in weights)
    if world.is_main:
        (folder / "passed").touch()
