"""Masters and moments in files: the same training, saved and resumed, as with all in memory."""

import sys
from pathlib import Path

from swin_moe import distributed
from tests.workers.equivalence import (
    MODEL,
    Cell,
    layout_of,
    make_engine,
    train_step,
    write_checkpoint,
)

# Smaller sub-groups stay in memory.
WIDE = MODEL.model_copy(update={"embed_dim": 64})
HALF, STEPS = 2, 4


def train(world, cell: Cell, folder: Path, first: int, last: int) -> list[float]:
    """Updates [first, last), from the checkpoint of ``first`` on if that is not the beginning."""
    from swin_moe.checkpoint import Reader, load_weights

    def prepare(model) -> None:
        if first:
            load_weights(model, reader, layout_of(model, world))

    if first:
        reader = Reader(folder / f"step-{first:08d}")
    engine = make_engine(world, cell, prepare, WIDE, str(folder.parent / "nvme"))
    if first:
        layout = layout_of(engine.model, world)
        engine.load(
            lambda name, *part: reader.values(name, part[0], layout.share_of(name), *part[1:]),
            first,
        )
    engine.train()
    figures = []
    for step in range(first, last):
        figures += [train_step(engine, world, cell, step), engine.grad_norm()]
    write_checkpoint(folder, engine, world, last)
    if cell.offload == "nvme":
        assert list((folder.parent / "nvme").rglob("*.swp")), "nothing is in files"
        flats = engine._engine.optimizer.fp32_partitioned_groups_flat
        assert any(flat.numel() == 0 for flat in flats), "everything is in memory"
    engine.close()
    return figures


def main() -> None:
    world = distributed.init()
    folder = Path(sys.argv[1])
    for dtype in ("fp32", "bf16"):
        figures = {}
        for offload in ("cpu", "nvme"):
            cell = Cell(2, stage=3, dtype=dtype, offload=offload)
            through = train(world, cell, folder / f"{dtype}-{offload}-through", 0, STEPS)
            halves = train(world, cell, folder / f"{dtype}-{offload}", 0, HALF)
            halves += train(world, cell, folder / f"{dtype}-{offload}", HALF, STEPS)
            assert halves == through, (offload, halves, through)
            figures[offload] = through
        assert figures["cpu"] == figures["nvme"], figures
    if world.is_main:
        (folder / "passed").touch()
    distributed.shutdown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
