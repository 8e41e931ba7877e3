"""The program with NaN in some training images, or a rank that sleeps over them.

``poison.json`` names [rank, update] pairs, how, and the program's arguments.
"""

import json
import sys
import time
from pathlib import Path

import torch

from swin_moe import cli, distributed
from swin_moe.data import Loader


def sleeping(_images: torch.Tensor) -> None:
    time.sleep(1000)


def spoiling(images: torch.Tensor) -> None:
    images[0] = torch.nan


HOW = {"nan": spoiling, "sleep": sleeping}


def main() -> None:
    spec = json.loads((Path(sys.argv[1]) / "poison.json").read_text())
    rank = distributed.environment_rank()[0]
    mine = {update for of, update in spec["poison"] if of == rank}
    original = Loader.epoch

    def epoch(self, epoch, start_batch=0):
        first = epoch * len(self) + start_batch + 1
        for update, batch in enumerate(original(self, epoch, start_batch), first):
            if self._sampler.training and update in mine:
                HOW[spec["how"]](batch.images)
            yield batch

    Loader.epoch = epoch
    distributed.leave(cli.main(spec["arguments"]))


if __name__ == "__main__":
    main()
