"""The program with NaN in some training images, or a rank that sleeps over them.

``poison.json`` names [rank, update] pairs, how, and the program's arguments.
"""

import json
import time
from pathlib import Path

import torch

from swin_moe.cli import main
from swin_moe.common import ranks
from swin_moe.data import Loader
from swin_moe.tasks.classification import Classification


def sleeping(_images: torch.Tensor) -> None:
    time.sleep(1000)


def spoiling(images: torch.Tensor) -> None:
    images[0] = torch.nan


HOW = {"nan": spoiling, "sleep": sleeping}


def work(folder: Path) -> None:
    spec = json.loads((folder / "poison.json").read_text())
    rank = ranks.environment_rank()[0]
    mine = {update for of, update in spec["poison"] if of == rank}
    read_of, prepare_of = Loader.read, Classification.prepare
    update = 0

    def read(self, epoch, start_batch=0):
        nonlocal update
        first = epoch * len(self) + start_batch + 1
        for number, batch in enumerate(read_of(self, epoch, start_batch), first):
            update = number if self.sampler.training else 0
            yield batch

    def prepare(self, batch, step, training):
        prepared = prepare_of(self, batch, step, training)
        if update in mine:
            HOW[spec["how"]](prepared.inputs["images"])
        return prepared

    Loader.read, Classification.prepare = read, prepare
    ranks.leave(main.main(spec["arguments"]))
