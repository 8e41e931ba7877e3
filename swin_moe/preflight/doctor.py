"""The command ``swin-moe doctor``: makes the checks of a start and prints tables."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import distributed
from ..config import Config
from ..distributed.meeting import Meeting
from ..ops import Choice, Signature
from ..tasks import build_task
from ..training.kernels import settle
from ..training.precision import resolve_precision
from .agreement import agree
from .facts import Facts
from .links import Links
from .start import Checked, check, timing_text

log = logging.getLogger("swin_moe")


def doctor(config: Config, meeting: Meeting, console: Console, json_file: Path | None) -> bool:
    """Check all processes, print the results, and return whether a run would begin.

    Args:
        meeting: of all processes.
        console: of rank 0.
        json_file: gets all results, if given.

    Raises:
        TimeoutError: some processes did not come.
        ConnectionError: some processes were lost.
    """
    verdict = agree(config, meeting)
    kernels: dict[Signature, Choice] = {}
    if verdict.problems:  # groups of different sizes, or another torch, could wait for ever
        checked = Checked(verdict.facts, verdict.problems, verdict.warnings)
    else:
        size = config.parallel.expert_parallel_size
        assert size != "auto"
        hierarchical = config.parallel.hierarchical_all_to_all
        world = distributed.init(size, hierarchical=hierarchical, meeting=meeting)
        from ..training.engine import check_deepspeed  # reads the environment that init sets

        check_deepspeed()
        dtype = resolve_precision(config.precision, world.device)
        checked = check(config, verdict, world, dtype)
        if config.ops.fused:
            kernels = settle(build_task(config, world.rank), world, dtype, log.info)
    if meeting.rank == 0:
        _print(checked, kernels, console)
        if json_file is not None:
            tried = {str(key): choice._asdict() for key, choice in kernels.items()}
            text = json.dumps(asdict(checked) | {"kernels": tried}, indent=1)
            json_file.write_text(text + "\n", encoding="utf-8")
    return not checked.problems


def _print(checked: Checked, kernels: dict[Signature, Choice], console: Console) -> None:
    if not console.is_terminal:
        console.width = 160  # a pipe has none of its own
    console.print(_versions(checked.facts))
    console.print(_hosts(checked.facts, checked.links))
    if kernels:
        console.print(_kernels(kernels))
    if checked.links is not None:
        console.print("links")
        for timing in checked.links.timings:
            console.print(f"  {timing_text(timing)}", highlight=False)
        slowest, usual = max(checked.links.ring), sorted(checked.links.ring)[0]
        console.print(
            f"  from each rank to the next: {1e3 * usual:.1f} to {1e3 * slowest:.1f} ms",
            highlight=False,
        )
    elif len(checked.facts) > 1:
        console.print("links were not timed: processes that differ could wait for ever")
    for warning in checked.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    for problem in checked.problems:
        console.print(f"refused: {problem}", highlight=False, markup=False, soft_wrap=True)
    count = len(checked.facts)
    who = "the process" if count == 1 else f"all {count} processes"
    if checked.problems:
        console.print(f"not fit: a run would be refused ({len(checked.problems)} reasons above)")
    else:
        also = " (but see the warnings)" if checked.warnings else ""
        console.print(f"fit: {who} may begin{also}")


def _versions(facts: list[Facts]) -> Table:
    """Return a table with a row for each value that a process has."""
    table = Table(title="versions", title_justify="left")
    table.add_column("of")
    table.add_column("value", overflow="fold")
    table.add_column("on", overflow="fold")
    for name in facts[0].versions:
        values: dict[str, list[str]] = {}
        for fact in facts:
            values.setdefault(fact.versions[name], []).append(fact.host)
        for value, hosts in values.items():
            names = list(dict.fromkeys(hosts))
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
            table.add_row(name, value, "all" if len(values) == 1 else f"{len(hosts)}: {shown}")
    return table


def _kernels(choices: dict[Signature, Choice]) -> Table:
    """Return a table with a row for each kernel that the run needs."""
    table = Table(title="kernels", title_justify="left")
    table.add_column("op")
    table.add_column("dtype")
    table.add_column("window, head width")
    table.add_column("runs", overflow="fold")
    for key, choice in choices.items():
        shape = f"{key.shape[0]}×{key.shape[1]}, {key.shape[2]}" if key.shape else "all"
        table.add_row(key.op, key.dtype, shape, str(choice))
    return table


def _hosts(facts: list[Facts], links: Links | None) -> Table:
    """Return a table with a row for each host."""
    table = Table(title="hosts", title_justify="left")
    table.add_column("host")
    for column in ("processes", "memory free", "GPU memory free", "disk free", "clock", "compute"):
        table.add_column(column, justify="right")
    for host in dict.fromkeys(fact.host for fact in facts):
        ranks = [rank for rank, fact in enumerate(facts) if fact.host == host]
        first = facts[ranks[0]]
        gpu = min(facts[rank].gpu_free for rank in ranks)
        table.add_row(
            host,
            str(len(ranks)),
            f"{first.memory / 1e9:.1f} GB",
            f"{gpu / 1e9:.1f} of {first.gpu_total / 1e9:.1f} GB" if first.gpu else "-",
            f"{first.disk / 1e9:.1f} GB",
            f"{1e3 * links.skew[ranks[0]]:+.1f} ms" if links else "-",
            f"{min(links.compute[r] for r in ranks) / 1e12:.3f} TFLOP/s" if links else "-",
        )
    return table
