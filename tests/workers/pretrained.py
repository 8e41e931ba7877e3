"""Compares the masters of ``model.pretrained``, before the first update, with the file."""

import contextlib
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console

from swin_moe import distributed, train
from swin_moe.config import Architecture, load_config
from swin_moe.distributed.watchdog import Watchdog
from swin_moe.models import build
from swin_moe.weights.files import write
from tests.parallel import MICRO, SMALL

CELLS = [  # ranks of an expert group, and settings; ZeRO-3 comes last
    (2, ["zero.stage=0"]),
    (2, ["zero.stage=2", "optimizer.moments=bf16"]),
    (1, ["zero.stage=1"]),
    (1, ["zero.stage=3"]),
    (1, ["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"]),
]


class Seen(Exception):
    """Raised after the masters have been compared, to end the training."""


def compare(expected: dict[str, torch.Tensor], session, trainer) -> None:
    """Replace the training: check that every weight equals the file's bit for bit."""
    from swin_moe.training.checkpointer import expert_layout

    engine, world = trainer.engine, session.run.world
    layout = expert_layout(engine.model, world)
    seen = 0
    for fragment in engine.fragments():
        share = layout.share_of(fragment.name)
        whole = expected[fragment.name]
        mine = whole if share is None else share.of(fragment.name, whole)
        part = mine.flatten()[fragment.start : fragment.stop]
        for kind, values in fragment.values.items():
            assert values.equal(part if kind == "weight" else torch.zeros_like(values)), (
                fragment.name,
                kind,
            )
        seen += part.numel()
    seen = int(distributed.all_reduce_(torch.tensor(float(seen))))
    assert seen == sum(tensor.numel() for tensor in expected.values())
    engine.close()
    raise Seen


def work(folder: Path) -> None:
    file = folder / "weights.safetensors"
    settings = [*SMALL, "precision.dtype=bf16", f"model.pretrained={file}"]
    for index, (experts, more) in enumerate(CELLS):
        world = distributed.init(expert_parallel_size=experts)
        own = [f"train.output={folder / str(index)}", f"parallel.expert_parallel_size={experts}"]
        config = load_config(MICRO, [*settings, *own, *more])
        torch.manual_seed(1)
        names = build(config.model, config.moe).state_dict()
        state = {name: torch.randn(tensor.shape) for name, tensor in names.items()}
        if world.is_main and index == 0:
            write(file, state, Architecture(model=config.model, moe=config.moe))
        distributed.barrier()
        check = partial(compare, state)
        with mock.patch.object(train, "fit", check), contextlib.suppress(Seen):
            train.train(config, world, Console(quiet=True), Watchdog(0.0, world.rank))
    if world.is_main:
        (folder / "passed").touch()
