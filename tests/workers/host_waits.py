"""What an update makes the host wait for, and what is ahead of the update, in one process."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe import distributed
from swin_moe.data import prefetch
from swin_moe.training.progress import Position
from tests.streams import Stream, Streams
from tests.workers.telemetry import ACCUMULATION, UPDATES, make_trainer


class Reads(TorchDispatchMode):
    """Counts ``item``, ``float`` and ``bool`` of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def check_waits(world) -> None:
    """An update reads one figure that the device has just computed: the gradient norm."""
    trainer, _ = make_trainer(world, stage=0)
    waits: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        accelerator = type(get_accelerator())
        patch.setattr(accelerator, "synchronize", lambda *_: waits.update(["synchronize"]))
        trainer.plan = replace(trainer.plan, log_every_steps=100)
        batches = prefetch.DeviceBatches(trainer.train_loader, world.device, 0)
        for _ in range(UPDATES):
            with Reads() as reads:
                trainer._update(batches)
            waits["read"] += reads.count
    assert waits == {"read": UPDATES}, waits
    trainer.engine.close()


class Ahead(prefetch.DeviceBatches):
    """Batches that are read ahead on a CPU, too."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._stream = Stream()


def run(world, ahead: bool, position: Position | None = None):
    """Train and save after each update.

    Returns:
        records, and at each save the update of the position and the batches that were read.
    """
    trainer, records = make_trainer(world)
    taken: list[int] = []
    read, saves = trainer.train_loader.read, []

    def noted(epoch, start):
        for index, batch in enumerate(read(epoch, start), start):
            taken.append(index)
            yield batch

    trainer.train_loader.read = noted
    trainer.save = lambda position: saves.append((position.update, len(taken)))
    trainer.plan = replace(trainer.plan, save_every_steps=1)
    trainer.position = position or Position()
    with pytest.MonkeyPatch.context() as patch:
        if ahead:
            Streams(patch)
            patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
            patch.setattr("swin_moe.training.trainer.DeviceBatches", Ahead)
        trainer.train_epoch()
    trainer.engine.close()
    fixed = [
        {k: v for k, v in record.items() if not k.endswith(("second", "_ms"))} for record in records
    ]
    return fixed, saves, taken


def check_position(world) -> None:
    """A checkpoint's position is that of the batch trained on, whatever has been read ahead."""
    plain, saves, _ = run(world, ahead=False)
    assert saves == [(n, n * ACCUMULATION) for n in range(1, UPDATES)]
    same, ahead, _ = run(world, ahead=True)
    assert same == plain
    assert ahead == [(n, n * ACCUMULATION + 1) for n in range(1, UPDATES)]
    _, _, taken = run(world, ahead=True, position=Position(step=1, update=1))
    assert taken == list(range(ACCUMULATION, UPDATES * ACCUMULATION))


def work(folder: Path) -> None:
    world = distributed.init()
    check_waits(world)
    check_position(world)
    (folder / "passed").touch()
