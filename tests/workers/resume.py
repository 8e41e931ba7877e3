"""Each world resumes a training that two processes began, in its middle.

The first launch, on two processes, trains three updates with expert parallelism and ZeRO-2 and
saves; every launch then goes on from there in its own way, and saves what it has loaded, too. One
process also trains through, and two in bf16, with ZeRO-2 and ZeRO-1.
"""

from pathlib import Path

from swin_moe import distributed
from swin_moe.common import ranks
from tests.workers.equivalence import (
    STEPS,
    Cell,
    make_engine,
    resume_engine,
    train_between,
    write_checkpoint,
    write_figures,
)

PARTS = 4  # micro-batches per update
HALF = 3
BEGINNING = Cell(2, 2, stage=2, accumulation=2)
ENDS = {
    1: [Cell(1, 1, stage=1, accumulation=4)],
    2: [
        Cell(2, 2, stage=2, dtype="bf16", accumulation=2),
        Cell(2, 2, stage=1, dtype="bf16", accumulation=2),
        Cell(2, 2, stage=0, accumulation=2, recompute=True),
        # This comes last: DeepSpeed then replaces PyTorch's linear function.
        Cell(2, 1, stage=3, accumulation=2),
    ],
    4: [Cell(4, 4, stage=1), Cell(4, 2, stage=2)],
}


def go_on(world, cell: Cell, folder: Path, first: int, last: int) -> None:
    """Train updates [first, last); from ``HALF`` on, resume the checkpoint of the beginning."""
    if first:
        source = folder.parent / BEGINNING._replace(dtype=cell.dtype).name
        engine = resume_engine(world, cell, source / f"step-{HALF:08d}", first)
        write_checkpoint(folder, engine, world, first)
    else:
        engine = make_engine(world, cell)
    figures = train_between(engine, world, cell, folder, first, last)
    if world.is_main:
        write_figures(folder, figures)
    engine.close()


def work(folder: Path) -> None:
    size = ranks.environment_rank()[2]
    if size == 1:
        go_on(distributed.init(), Cell(1, accumulation=PARTS), folder / "through-fp32", 0, STEPS)
    if size == 2:
        world = distributed.init(expert_parallel_size=2)
        low = BEGINNING._replace(dtype="bf16")
        for cell in (BEGINNING, low):
            go_on(world, cell, folder / cell.name, 0, HALF)
        go_on(world, low, folder / "through-bf16", 0, STEPS)
        go_on(world, low._replace(stage=1), folder / "through-bf16-stage-1", 0, STEPS)
    for cell in ENDS[size]:
        world = distributed.init(expert_parallel_size=cell.expert_parallel)
        go_on(world, cell, folder / f"to-{cell.name}", HALF, STEPS)
