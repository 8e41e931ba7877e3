"""Exit codes, and helpers that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..common import ranks
from ..common.text import plain

DONE, FAILED, WRONG_USE = 0, 1, 2


def widen(console: Any, width: int) -> None:
    """Set the console's width to ``width`` columns if its output is no terminal."""
    if not console.is_terminal:
        console.width = width


def run_or_checkpoint(text: str) -> Path:
    """Return the folder that the user gave.

    Raises:
        ValueError: it does not exist, or holds weights only.
    """
    path = Path(text)
    # A folder of another program's weights, such as Hugging Face's, has this file.
    if path.is_file() or (path / "config.json").is_file():
        kind = "is a file" if path.is_file() else "is a folder of weights alone"
        raise ValueError(
            f"{plain(text)} {kind}; a run or checkpoint folder also knows its data: make one of "
            f"these weights by `swin-moe train CONFIG model.pretrained={plain(text)} "
            "train.output=FOLDER train.max_steps=1 schedule.warmup_epochs=1 schedule.warmup_lr=0` "
            "(one update at a rate of 0), and give FOLDER"
        )
    if not path.is_dir():
        raise ValueError(f"{plain(text)}: no such run directory or checkpoint folder")
    return path


def single_process(command: str) -> Any:
    """Return the :class:`~swin_moe.distributed.World` of a command that runs as one process.

    Raises:
        ValueError: a launcher has started several.
    """
    if warning := ranks.check_alone(command):
        print(f"swin-moe: {warning}", file=sys.stderr, flush=True)
    from .. import distributed

    return distributed.init()
