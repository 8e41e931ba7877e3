"""The commands ``swin-moe checkpoint list | verify | reshard | export``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import checkpoint
from ..checkpoint import CheckpointError
from ..checkpoint.contents import Contents
from ..common.terminal import Terminal, cell
from ..common.text import plain, reason
from .shared import DONE, FAILED, widen

_GONE = "removed meanwhile by a running training"


def checkpoint_command(arguments: argparse.Namespace, console: Any) -> int:
    """List, verify, reshard or export the checkpoints of a run."""
    path = Path(arguments.path)
    if arguments.action == "list":
        widen(console, 160)
        console.print(list_table(path))
    elif arguments.action == "verify":
        return DONE if verify(path, console) else FAILED
    elif arguments.action == "reshard":
        reshard(path, Path(arguments.output), arguments.files, console)
    else:
        export(path, Path(arguments.output), console, arguments.overwrite)
    return DONE


def list_table(path: Path) -> Table:
    """Return a table of the checkpoints of a run: progress, size and layout of each."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("checkpoint", overflow="fold")
    for column in ("step", "epoch", "best", "MB", "files", "written by", "is"):
        table.add_column(column, justify="right" if column != "is" else "left")
    for folder in checkpoint.find(path):
        names = [n for n in ("last", "best") if (folder.parent / n).resolve() == folder.resolve()]
        try:
            table.add_row(cell(folder), *_row(folder), ", ".join(names))
        except (CheckpointError, FileNotFoundError) as error:
            damage = str(error).removeprefix(f"{folder}: ") if folder.is_dir() else _GONE
            table.add_row(cell(folder), *[""] * 6, cell(damage))
    return table


def _row(folder: Path) -> list[str]:
    contents = Contents(folder)
    state = contents.state
    position = state.get("position", {})
    keys = ("processes", "expert_parallel_size", "zero_stage")
    processes, group, stage = (state.get(key, "?") for key in keys)
    return [
        str(state.get("step", "")),
        f"{position['epoch']} + {position['update']}" if "epoch" in position else "",
        _best(state),
        f"{_size(folder) / 1e6:.1f}",
        str(len(contents.files)),
        f"{processes} × EP {group} × ZeRO {stage}",
    ]


def _best(state: dict[str, Any]) -> str:
    """Return the best value of the run's metric so far, such as ``top-1 87.00 %``."""
    position = state.get("position", {})
    if "best_top1" in position:  # of an earlier version
        return f"top-1 {position['best_top1']:.2f} %" if position["best_top1"] >= 0 else ""
    value, metric = position.get("best"), state.get("metric", {})
    if value is None:
        return ""
    unit = metric.get("unit", "")
    return f"{metric.get('label', '')} {f'{value:.2f} {unit}' if unit else f'{value:.4f}'}"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def verify(path: Path, console: Console) -> bool:
    """Read every byte of the checkpoints, print a line for each, return whether all are whole."""
    whole, errors = True, Terminal(stderr=True)
    for folder in track(
        checkpoint.find(path),
        "verifying",
        console=errors,
        transient=True,
        disable=not errors.live,
    ):
        try:
            checkpoint.verify(folder)
            Contents(folder).check_complete()
            text = f"{plain(folder)}: whole ({_size(folder) / 1e6:.1f} MB)"
        except (CheckpointError, FileNotFoundError) as error:
            there = folder.is_dir()
            whole = whole and not there
            text = reason(error) if there else f"{plain(folder)}: {_GONE}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return whole


def reshard(path: Path, target: Path, files: int, console: Console) -> None:
    """Write the newest whole checkpoint in another number of files.

    Raises:
        ValueError: see :func:`swin_moe.checkpoint.reshard`.
    """
    if files < 1:
        raise ValueError(f"--files {files}: expected a number above 0")
    source = checkpoint.choose(path)
    started = time.monotonic()
    checkpoint.reshard(source, target, files)
    console.print(
        f"{plain(source)} → {plain(target)}: {_size(target) / 1e6:.1f} MB in {files} files, "
        f"{time.monotonic() - started:.1f} s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def export(path: Path, target: Path, console: Console, overwrite: bool) -> None:
    """Write the weights alone, with their config, as one safetensors file for inference."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: export writes .safetensors (`swin-moe convert` knows others)")
    from ..weights.convert import convert  # imports torch

    checkpoint.read_newest(path, lambda found: convert(found, target, console, overwrite=overwrite))
