"""The commands ``swin-moe models`` and ``swin-moe convert``.

Parameters and multiply-accumulates are in ``models.json``, so that the table needs no torch.
``python -m swin_moe.cli.models`` counts them again; a test compares them with the models.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..config import parse_overrides, unknown_model, validate
from ..config.variants import PUBLISHED, VARIANTS, Published
from .shared import DONE, widen

COUNTS = Path(__file__).with_suffix(".json")


def models_command(arguments: argparse.Namespace, console: Any) -> int:
    """Print the table of the named models."""
    table = models_table(arguments.pattern)
    widen(console, 120)
    console.print(table)
    return DONE


def convert_command(arguments: argparse.Namespace, console: Any) -> int:
    """Translate weights."""
    from ..weights.convert import Upcycle, convert

    convert(
        Path(arguments.input),
        Path(arguments.output),
        console,
        source_dialect=arguments.source,
        dialect=arguments.target,
        model_name=arguments.model,
        overrides=parse_overrides(arguments.overrides),
        allow_missing=arguments.allow_missing,
        upcycling=Upcycle.parse(arguments.upcycle) if arguments.upcycle else None,
        ranks=arguments.ranks,
        overwrite=arguments.overwrite,
        network=arguments.take,
    )
    return DONE


def count_all() -> dict[str, list[int]]:
    """Count parameters and multiply-accumulates of every named model."""
    from ..models.cost import count

    configs = {name: validate({"model": {"name": name}}) for name in sorted(VARIANTS)}
    costs = {name: count(config.model, config.moe) for name, config in configs.items()}
    return {name: [cost.parameters, cost.macs] for name, cost in costs.items()}


def models_table(pattern: str) -> Table:
    """Return a table of the named models whose names match, with counted and published costs.

    Raises:
        ValueError: no name matches.
    """
    counts = json.loads(COUNTS.read_text())
    names = sorted(name for name in VARIANTS if fnmatch(name, pattern))
    if not names:
        raise ValueError(unknown_model(pattern))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), caption="published: the official tables")
    table.add_column("model", overflow="fold")
    for column in ("px/win", "params M", "published", "GMACs", "published", "top-1 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in names:
        config = validate({"model": {"name": name}})
        parameter_count, macs = counts[name]
        printed = PUBLISHED.get(name, Published("", ""))
        parameters = printed.parameters
        exponent = "e" in parameters
        top1 = f"{printed.top1:g}" if printed.top1 else ""
        table.add_row(
            name,
            f"{config.model.img_size}/{config.model.window_size}",
            f"{parameter_count / 1e6:.3f}",
            f"{float(parameters):g}" if exponent else parameters,
            f"{macs / 1e9:.3f}",
            printed.gmacs or "",
            f"{top1} (22K)" if top1 and name.endswith("_22k") else top1,
        )
    return table


if __name__ == "__main__":
    lines = (f"  {json.dumps(name)}: {count}" for name, count in count_all().items())
    COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
