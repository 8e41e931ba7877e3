"""The checks of a start: all of them, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ..common.text import reason
from ..config import Config
from ..distributed import World
from ..models.cost import Cost, count
from .agreement import Agreement, agree
from .facts import Facts
from .links import Links, Timing, judge, measure
from .shared import check_data, check_folder

_AFTER_FAILURE = 10.0  # seconds that the others have to say that they failed, too
STATE = 12  # bytes of a checkpoint for each parameter: masters and two moments


@dataclass(frozen=True)
class Checked:
    """All that was found; the same on every rank. ``links`` is None for a process alone."""

    facts: list[Facts]
    problems: list[str]
    warnings: list[str]
    links: Links | None


def at_start(
    config: Config,
    verdict: Agreement,
    world: World,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> None:
    """Check what the processes are to one another; a line if all is well.

    Raises:
        ValueError: the run would break; one line. ConnectionError, TimeoutError: a link did.
    """
    checked = check(config, verdict, world, dtype)
    if checked.problems:
        raise ValueError(checked.problems[0])
    for warning in checked.warnings:
        say(f"warning: {warning}")
    if checked.links is not None:
        say(told(checked))


def check(config: Config, verdict: Agreement, world: World, dtype: torch.dtype) -> Checked:
    """The run directory, the data, clocks, speeds and links of processes that agree."""
    facts, cost = verdict.facts, count(config.model, config.moe)
    problems, warnings = list(verdict.problems), list(verdict.warnings)
    links = None
    if world.size > 1 and not problems:
        links, found = _connected(config, cost, dtype, world, facts)
        problems += found
        warnings += judge(links, facts)
    return Checked(facts, problems, warnings + _short_of_disk(config, cost, facts), links)


def refuse(verdict: Agreement) -> None:
    """Raise ``ValueError`` with the first reason not to begin."""
    if verdict.problems:
        raise ValueError(verdict.problems[0])


def _connected(
    config: Config, cost: Cost, dtype: torch.dtype, world: World, facts: list[Facts]
) -> tuple[Links, list[str]]:
    """Links and shared folders; whoever fails or hangs there is named on every rank."""
    assert world.meeting is not None
    result: tuple[Links, list[str]] | None = None
    failed = ""
    try:
        found = check_folder(config, world, facts) + check_data(config, facts)
        result = measure(config, cost, dtype, world, facts), found
    except RuntimeError as error:
        failed = f"{facts[world.rank].host} (rank {world.rank}): {reason(error)}"
    timeout = _AFTER_FAILURE if failed else None
    failed = world.meeting.exchange("links", failed, lambda said: max(said, key=len), timeout)
    if failed or result is None:
        raise ConnectionError(f"the processes lost one another while links were timed: {failed}")
    return result


def _short_of_disk(config: Config, cost: Cost, facts: list[Facts]) -> list[str]:
    """Every host is taken to write to the disk that rank 0 does."""
    kept = config.checkpoint.keep_last + 2  # the best one, and the one being written
    needed = STATE * cost.parameters * kept
    if facts[0].disk >= needed:
        return []
    return [
        f"{facts[0].host}: {_size(facts[0].disk)} are free for train.output, but its "
        f"{kept} checkpoints may take {_size(needed)} (checkpoint.keep_last)"
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def told(checked: Checked) -> str:
    """The one line of a start at which all is well."""
    facts, links = checked.facts, checked.links
    assert links is not None
    hosts = len({fact.host for fact in facts})
    parts = [
        f"preflight: {len(facts)} processes on {hosts} host{'s' * (hosts > 1)} are alike",
        *(timing_text(timing) for timing in links.timings),
    ]
    if hosts > 1:
        parts.append(f"clocks within {1e3 * max(map(abs, links.skew)):.1f} ms")
    return "; ".join(parts)


def timing_text(timing: Timing) -> str:
    size = f"{timing.bytes / 1e6:.1f} MB"
    return (
        f"{timing.name} of {size} {1e3 * timing.seconds:.1f} ms ({timing.bandwidth / 1e9:.2f} GB/s)"
    )


def to_json(checked: Checked) -> str:
    return json.dumps(asdict(checked), indent=1)


__all__ = ["Checked", "agree", "at_start", "check", "refuse", "timing_text", "to_json", "told"]
