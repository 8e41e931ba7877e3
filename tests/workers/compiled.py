"""Engines train with graphs as without; a rank whose compiler fails stops no other."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import torch

from swin_moe import distributed
from swin_moe.models import graphs
from swin_moe.tasks.base import whole_batch
from tests.workers.equivalence import Cell, make_engine, train_step

CELLS = [
    Cell(2, 2, 0, "bf16"),  # autocast
    Cell(2, 1, 2, "bf16", accumulation=2, recompute=True),  # bf16 weights
]


made: list[object] = []  # the graphs of this process


def keep(graph, inputs):
    """Serve as a backend that runs graphs as they are: the compiler is not the question here."""
    made.append(graph)
    return graph


def fail(graph, inputs):
    raise ValueError("no compiler")


class Watchdog:
    """The names of the phases."""

    def __init__(self):
        self.phases = []

    @contextlib.contextmanager
    def phase(self, what, **limits):
        self.phases.append((what, limits))
        yield


def compiled(engine, world, cell: Cell, wanted) -> str:
    """Compile the blocks and return the line that is printed."""
    from swin_moe.training.compile import compile_blocks

    lines, watchdog = [], Watchdog()
    config = SimpleNamespace(
        train=SimpleNamespace(compile=wanted), data=SimpleNamespace(batch_size=cell.micro_batch)
    )

    def example_batch(count, device):
        return whole_batch({"images": torch.randn(count, 1, 16, 16, device=device)}, None)

    before, state = dict(engine.parameters), torch.get_rng_state()
    copies = {name: parameter.detach().clone() for name, parameter in before.items()}
    task = SimpleNamespace(config=config, example_batch=example_batch)
    compile_blocks(SimpleNamespace(world=world, say=lines.append), task, engine, watchdog)
    assert torch.get_rng_state().equal(state)
    assert all(p.equal(copies[name]) and p.grad is None for name, p in before.items())
    assert watchdog.phases == [("the blocks were compiled", {"works": True, "limits": 2.0})]
    assert lines.pop(0).startswith("compiling the blocks")
    return lines[0] if lines else ""


def steps(engine, world, cell: Cell) -> list[float]:
    engine.train()
    losses = [train_step(engine, world, cell, step) for step in range(2)]
    engine.close()
    return losses


def work(folder: Path) -> None:
    world = distributed.init()
    graphs.BACKEND = keep
    for cell in CELLS:
        cell = cell._replace(gentle=True)
        expected = steps(make_engine(world, cell), world, cell)
        engine = make_engine(world, cell)
        line = compiled(engine, world, cell, wanted=True)
        assert line.startswith("compile: on, "), line
        count = len(made)
        assert count > 0
        losses = steps(engine, world, cell)
        assert len(made) == count, "a graph was made after the start"
        torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
        torch._dynamo.reset()
    if world.rank == 1:
        graphs.BACKEND = fail
    for wanted, said in ((True, "compile: on, "), ("auto", "compile: off, because the compiler")):
        engine = make_engine(world, CELLS[1])
        line = compiled(engine, world, CELLS[1], wanted)
        assert line.startswith(said) if world.is_main else line == "", line
        blocks = [block for layer in engine.model.layers for block in layer.blocks]
        on = wanted is True and world.is_main
        assert all(("dense" in vars(block) or "begin" in vars(block)) == on for block in blocks)
        steps(engine, world, CELLS[1])
    if world.is_main:
        (folder / "passed").touch()
