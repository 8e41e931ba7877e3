"""The command ``swin-moe models``: the named models beside the published tables."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .config import unknown_model, validate
from .models import list_models
from .models.cost import count
from .variants import PUBLISHED, Published


def models_table(pattern: str) -> Table:
    """The named models with our counts beside the published ones.

    Raises:
        ValueError: no name matches.
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(unknown_model(pattern))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), caption="published: the official tables")
    table.add_column("model", overflow="fold")
    for column in ("px/win", "params M", "published", "GMACs", "published", "top-1 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in track(names, "counting", console=Console(stderr=True), transient=True):
        config = validate({"model": {"name": name}})
        cost = count(config.model, config.moe)
        printed = PUBLISHED.get(name, Published("", ""))
        parameters = printed.parameters
        exponent = "e" in parameters
        top1 = f"{printed.top1:g}" if printed.top1 else ""
        table.add_row(
            name,
            f"{config.model.img_size}/{config.model.window_size}",
            f"{cost.parameters / 1e6:.3f}",
            f"{float(parameters):g}" if exponent else parameters,
            f"{cost.macs / 1e9:.3f}",
            printed.gmacs or "",
            f"{top1} (22K)" if top1 and name.endswith("_22k") else top1,
        )
    return table
