"""Masters and moments in files: training, save and resume equal those in memory."""

from pathlib import Path

from swin_moe import distributed
from tests.workers.equivalence import (
    MODEL,
    Cell,
    make_engine,
    resume_engine,
    train_between,
)

# Smaller sub-groups stay in memory.
WIDE = MODEL.model_copy(update={"embed_dim": 64})
HALF, STEPS = 2, 4
FILES = ("nvme", "nvme")  # also weights


def train(
    world, cell: Cell, folder: Path, first: int, last: int, weights: str = "none", **options: str
) -> list[float]:
    """Make updates [first, last), from the checkpoint of ``first`` if that is not 0."""
    options |= {"shape": WIDE, "nvme_path": str(folder.parent / "nvme"), "weights": weights}
    if first:
        engine = resume_engine(world, cell, folder / f"step-{first:08d}", first, **options)
    else:
        engine = make_engine(world, cell, **options)
    figures = train_between(engine, world, cell, folder, first, last)
    if cell.offload == "nvme":
        assert list((folder.parent / "nvme").rglob("*.swp")), "nothing is in files"
        flats = engine.deepspeed.optimizer.fp32_partitioned_groups_flat
        assert any(flat.numel() == 0 for flat in flats), "everything is in memory"
    engine.close()
    return figures


def work(folder: Path) -> None:
    world = distributed.init()
    for dtype in ("fp32", "bf16"):
        for moments in ("fp32", "bf16"):
            figures = []
            for offload, weights in (("cpu", "none"), ("cpu", "cpu"), ("nvme", "none"), FILES):
                cell = Cell(2, stage=3, dtype=dtype, offload=offload)
                options = {"weights": weights, "moments": moments}
                place = folder / f"{dtype}-{moments}-{offload}-{weights}"
                through = train(world, cell, place / "through", 0, STEPS, **options)
                halves = train(world, cell, place, 0, HALF, **options)
                halves += train(world, cell, place, HALF, STEPS, **options)
                assert halves == through, (offload, halves, through)
                figures.append(through)
                print(f"{place.name} passed", flush=True)
            assert figures[1:] == figures[:-1], figures
    if world.is_main:
        (folder / "passed").touch()
