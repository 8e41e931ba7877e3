"""Trains a few steps in every legal way on any number of processes; writes losses and weights.

An update is of as many images in every cell. With w processes and a micro-steps they come as the
w·a micro-batches that one process with w·a micro-steps sees, with the same capacities and queues.
Four processes with expert groups of two replicate one another's experts; in "sharded" cells two
processes hold one expert together.
"""

import itertools
import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.config import ModelConfig, MoEConfig, OptimizerConfig, ZeroConfig
from swin_moe.distributed.expert_placement import ExpertLayout, expert_share

STEPS = 5
IMAGES = 32  # of an update
MICRO_BATCH = 4  # images, in tests of single parts
MODEL = ModelConfig(
    img_size=16, patch_size=2, in_chans=1, num_classes=5, embed_dim=8, depths=[1, 2],
    num_heads=[1, 2], window_size=4, drop_path_rate=0.0,
)  # fmt: skip
MOE = MoEConfig(
    blocks=[[], [1]], num_experts=4, top_k=2, capacity_factor=0.75, gate_noise=0.0,
    balance="gshard", aux_loss_weight=0.1,
)  # fmt: skip
SHARDED = MOE.model_copy(
    update={"num_experts": 2, "top_k": 1, "overlap_degree": 2, "expert_bias_update_rate": 0.05}
)
# Every step is clipped; eps is large enough to hide the rounding of near-zero gradients,
# and small enough to show a wrong scale of the gradients.
OPTIMIZER = OptimizerConfig(base_lr=0.5, clip_norm=0.2, eps=1e-4)
# For bf16 and fp16: at the rate above, rounding changes routes by the third step, and any figure
# may come out. At this rate the routes stay, and a bound can be tight.
GENTLE = OPTIMIZER.model_copy(update={"base_lr": 0.1})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Cell(NamedTuple):
    """One way to train."""

    world: int
    expert_parallel: int = 1
    stage: int = 0
    dtype: str = "fp32"
    accumulation: int = 1
    recompute: bool | Literal["offload"] = False  # activation checkpointing
    sharded: bool = False
    gentle: bool = False
    offload: Literal["none", "cpu", "nvme"] = "none"  # of masters and moments

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in self)

    @property
    def parts(self) -> int:
        """The micro-batches of an update."""
        return self.world * self.accumulation

    @property
    def micro_batch(self) -> int:
        return IMAGES // self.parts

    @property
    def reference(self) -> "Cell":
        gentle = self.gentle or self.dtype != "fp32"
        return Cell(1, accumulation=self.parts, sharded=self.sharded, gentle=gentle)


def legal_cells(world: int) -> list[Cell]:
    """Return {expert parallel 1, 2, 4} × ZeRO {0 … 3} × dtype × accumulation {1, 2} × recompute."""
    groups = [(n, stage) for n in (1, 2, 4) if n <= world for stage in range(4)]
    groups = [(n, stage) for n, stage in groups if stage < 3 or n == 1]
    ways = itertools.product(groups, ("fp32", "bf16"), (1, 2), (False, True))
    cells = [
        Cell(world, n, stage, dtype, accumulation, recompute)
        for (n, stage), dtype, accumulation, recompute in ways
    ]
    if world == 2:
        cells += [Cell(2, 2, stage, offload="cpu", recompute="offload") for stage in (1, 2)]
        cells += [Cell(2, 1, 3, offload="cpu", recompute="offload")]
        cells += [Cell(2, 1, stage, "bf16", recompute="offload") for stage in (0, 3)]
        cells += [Cell(2, n, stage, "fp16", recompute=n == 2) for n, stage in groups]
    if world == 4:
        cells += [Cell(4, 4, stage, sharded=True) for stage in range(3)]
    return cells


def edges(cells: list[Cell]) -> list[Cell]:
    """Return a cell of each expert group and ZeRO stage, and all special ones."""
    special = [
        c
        for c in cells
        if c.sharded or c.offload != "none" or c.recompute == "offload" or c.dtype == "fp16"
    ]
    usual = [cell for cell in cells if cell not in special]
    chosen = []
    for turn, (_, some) in enumerate(itertools.groupby(usual, lambda c: c[:3])):
        kinds = list(some)
        chosen.append(kinds[turn * 3 % len(kinds)])  # 3 and 8 kinds have no common factor
    return chosen + special


def batch(step: int, part: int, size: int = MICRO_BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    images = torch.randn(size, 1, 16, 16, generator=generator)
    return images, torch.randint(0, 5, (size,), generator=generator)


def layout_of(model, world) -> ExpertLayout:
    from swin_moe.models import expert_parameter_names

    experts = model.moe.num_experts
    share = expert_share(experts, world.expert.rank, world.expert.size)
    return ExpertLayout(expert_parameter_names(model), experts, share)


def write_checkpoint(folder: Path, engine, world, step: int = STEPS) -> None:
    from swin_moe.checkpoint import Writer

    results = []
    writer = Writer(folder, world, results.append)
    layout = layout_of(engine.model, world)
    writer.save(step, engine.fragments(), layout, state={}, config_text="", keep_last=100)
    assert writer.wait(), results


def make_engine(
    world, cell: Cell, prepare=lambda model: None, shape=MODEL, nvme_path="", moments="fp32",
    weights="none",
):  # fmt: skip
    """Make the engine of a cell; ``prepare`` may change the model before DeepSpeed gets it."""
    from swin_moe.models import build
    from swin_moe.training.engine import Engine

    distributed.seed_everything(0)
    moe = SHARDED if cell.sharded else MOE
    model = build(shape.model_copy(update={"use_checkpoint": cell.recompute}), moe, world.expert)
    for parameter in model.parameters():  # block norms start at zero, which would disable paths
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
    prepare(model)
    gentle = cell.gentle or cell.dtype != "fp32"
    optimizer = GENTLE if gentle else OPTIMIZER
    return Engine(
        model,
        world,
        optimizer=optimizer.model_copy(update={"moments": moments}),
        zero=ZeroConfig(
            stage=cell.stage,
            offload_optimizer=cell.offload,
            nvme_path=nvme_path,
            offload_param=weights,
        ),
        dtype=DTYPES[cell.dtype],
        micro_batch=cell.micro_batch,
        gradient_accumulation_steps=cell.accumulation,
    )


def resume_engine(world, cell: Cell, checkpoint: Path, first: int, **options):
    """Return the engine of a cell, loaded from the checkpoint of update ``first``."""
    from swin_moe.checkpoint import Reader, load_weights

    reader = Reader(checkpoint)

    def prepare(model) -> None:
        load_weights(model, reader, layout_of(model, world))

    engine = make_engine(world, cell, prepare, **options)
    layout = layout_of(engine.model, world)

    def read(name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        return reader.values(name, kind, layout.share_of(name), start, stop)

    engine.load(read, first)
    return engine


def train_between(engine, world, cell: Cell, folder: Path, first: int, last: int) -> list[float]:
    """Make updates [first, last) and a checkpoint; return loss and gradient norm, alternating."""
    engine.train()
    figures = []
    for step in range(first, last):
        figures += [train_step(engine, world, cell, step), engine.grad_norm()]
    write_checkpoint(folder, engine, world, last)
    return figures


def write_figures(folder: Path, figures: list[float]) -> None:
    text = json.dumps({"loss": figures[::2], "norm": figures[1::2]})
    (folder / "figures.json").write_text(text)


def train_step(engine, world, cell: Cell, step: int) -> float:
    """Make an update; return the mean loss of all micro-batches of all ranks."""
    from swin_moe.moe import num_experts, update_expert_bias

    model = engine.model
    total, counts = torch.zeros(()), torch.zeros(1, num_experts(model))
    for micro in range(cell.accumulation):
        part = world.rank * cell.accumulation + micro
        images, labels = batch(step, part, cell.micro_batch)
        output = engine.forward({"images": images})
        loss = F.cross_entropy(output.predictions, labels) + output.aux_loss
        assert output.routing.dropped.sum() > 0  # the capacity has an effect
        engine.backward(loss)
        engine.step()
        total += loss.detach()
        counts += output.routing.counts
    update_expert_bias(model, distributed.all_reduce_(counts))
    return float(distributed.all_reduce_(total)) / cell.parts


def train(world, cell: Cell, folder: Path) -> None:
    engine = make_engine(world, cell)
    if cell == cell.reference:
        write_checkpoint(folder, engine, world, 0)
    figures = train_between(engine, world, cell, folder, 0, STEPS)
    if world.is_main:
        write_figures(folder, figures)
    engine.close()


def run_fp16_anywhere() -> None:
    """Let DeepSpeed use fp16 on any CPU; without fp16 instructions it is slow."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def work(folder: Path) -> None:
    run_fp16_anywhere()
    size = ranks.environment_rank()[2]
    wanted = json.loads((folder / "cells.json").read_text())
    cells = [cell for cell in map(Cell._make, wanted) if cell.world == size]
    # ZeRO-3 comes last: it replaces PyTorch's linear function for good.
    cells.sort(key=lambda cell: (cell.stage == 3, cell.expert_parallel))
    for (_, n), some in itertools.groupby(cells, lambda c: (c.stage == 3, c.expert_parallel)):
        world = distributed.init(expert_parallel_size=n)
        for cell in some:
            train(world, cell, folder / cell.name)
