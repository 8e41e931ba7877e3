"""The commands ``swin-moe prepare-data`` and ``swin-moe data show | verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .shared import DONE, FAILED


def prepare_data_command(arguments: argparse.Namespace, console: Any) -> int:
    """Write a data set as shuffled shards."""
    from ..data.tools.commands import prepare_data

    prepare_data(
        Path(arguments.input),
        Path(arguments.output),
        console,
        val_share=arguments.val,
        shard_megabytes=arguments.shard_size,
        resize=arguments.resize,
        classes=arguments.classes,
        seed=arguments.seed,
        workers=arguments.workers,
        max_pixels=arguments.max_pixels,
    )
    return DONE


def data_command(arguments: argparse.Namespace, console: Any) -> int:
    """Draw the input of a config, or list the unreadable samples of a data set."""
    if arguments.action == "show":
        from ..config import load_config
        from ..reporting.contact_sheet import show

        show(load_config(arguments.config, arguments.overrides), arguments.output, console)
        return DONE
    from ..data.tools.commands import verify_data

    path = Path(arguments.path)
    well = verify_data(path, console, arguments.output, arguments.workers, arguments.max_pixels)
    return DONE if well else FAILED
