"""bf16 moments at each ZeRO stage: trained, saved, loaded, and converted to fp32 and back."""

from pathlib import Path

import torch

from swin_moe import distributed
from tests.workers.equivalence import Cell, make_engine, resume_engine, train_between

HALF, STEPS = 2, 4


def train(world, cell: Cell, folder: Path, moments: str, first: int, last: int) -> list[float]:
    """Make updates [first, last), from the checkpoint of ``first`` if that is not 0."""
    if first:
        engine = resume_engine(world, cell, folder / f"step-{first:08d}", first, moments=moments)
    else:
        engine = make_engine(world, cell, moments=moments)
    figures = train_between(engine, world, cell, folder, first, last)
    engine.close()
    return figures


def close(one: list[float], other: list[float]) -> bool:
    return all(abs(a - b) < 5e-3 * abs(b) for a, b in zip(one, other, strict=True))


def work(folder: Path) -> None:
    from swin_moe.checkpoint import Reader

    world = distributed.init()
    cells = [Cell(world.size, 1, stage, gentle=True) for stage in range(4)]
    cells += [Cell(world.size, 1, stage, gentle=True, offload="cpu") for stage in (2, 3)]
    cells.sort(key=lambda cell: cell.stage)
    for cell in cells:
        place = folder / cell.name
        wide = train(world, cell, place / "fp32", "fp32", 0, STEPS)
        through = train(world, cell, place / "through", "bf16", 0, STEPS)
        assert close(through, wide), (cell, through, wide)
        halves = train(world, cell, place / "halves", "bf16", 0, HALF)
        saved = Reader(place / "halves" / f"step-{HALF:08d}")
        assert saved.tensor("head.weight", "exp_avg").dtype == torch.bfloat16
        # From bf16 on in fp32, and in bf16 without a break.
        mixed = train(world, cell, place / "halves", "fp32", HALF, STEPS)
        assert close(halves + mixed, wide), (cell, halves + mixed, wide)
        halves += train(world, cell, place / "halves", "bf16", HALF, STEPS)
        assert halves == through, (cell, halves, through)
        back = train(world, cell, place / "fp32", "bf16", STEPS, STEPS + 1)
        assert len(back) == 2
    if world.is_main:
        (folder / "passed").touch()
