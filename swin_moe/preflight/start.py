"""Makes the checks of a start, and reports them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..common.text import reason
from ..config import Config
from ..distributed import World
from ..models.cost import Cost, count
from .agreement import Agreement
from .facts import Facts
from .links import Links, Timing, judge, measure
from .shared import check_data, check_folder

_AFTER_FAILURE = 10.0  # seconds that the others have to report a failure, too
STATE = 12  # bytes of a parameter in a checkpoint: master and two moments


@dataclass(frozen=True)
class Checked(Agreement):
    """An agreement with the results of all checks.

    Attributes:
        links: None for a process alone, or if there are problems.
    """

    links: Links | None = None


def at_start(
    config: Config,
    verdict: Agreement,
    world: World,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> None:
    """Make the checks of a start, and report warnings and one line of timings.

    Args:
        verdict: of :func:`agree`.
        dtype: of the run's messages.
        say: prints a line.

    Raises:
        ValueError: the run would break; one line.
        ConnectionError: a link broke.
        TimeoutError: a process did not answer.
    """
    checked = check(config, verdict, world, dtype)
    if checked.problems:
        raise ValueError(checked.problems[0])
    for warning in checked.warnings:
        say(f"warning: {warning}")
    if checked.links is not None:
        say(summary_line(checked))


def check(config: Config, verdict: Agreement, world: World, dtype: torch.dtype) -> Checked:
    """Check run directory, data, clocks, speeds, links and disk of processes that agree."""
    facts, cost = verdict.facts, count(config.model, config.moe)
    problems, warnings = list(verdict.problems), list(verdict.warnings)
    links = None
    if world.size > 1 and not problems:
        links, found = _connected(config, cost, dtype, world, facts)
        problems += found
        warnings += judge(links, facts)
    return Checked(facts, problems, warnings + _short_of_disk(config, cost, facts), links)


def refuse(verdict: Agreement) -> None:
    """Raise ``ValueError`` with the first problem, if there is one."""
    if verdict.problems:
        raise ValueError(verdict.problems[0])


def _connected(
    config: Config, cost: Cost, dtype: torch.dtype, world: World, facts: list[Facts]
) -> tuple[Links, list[str]]:
    """Measure the links and check the shared folders; return links and problems.

    Raises:
        ConnectionError: a rank failed; it is named on every rank.
        TimeoutError: a rank hangs; it is named on every rank.
    """
    assert world.meeting is not None
    result: tuple[Links, list[str]] | None = None
    failed = ""
    try:
        found = check_folder(config, world, facts) + check_data(config, facts)
        result = measure(config, cost, dtype, world, facts), found
    except RuntimeError as error:
        failed = f"{facts[world.rank].host} (rank {world.rank}): {reason(error)}"
    timeout = _AFTER_FAILURE if failed else None
    failed = world.meeting.exchange("links", failed, lambda texts: max(texts, key=len), timeout)
    if failed or result is None:
        raise ConnectionError(f"the processes lost one another while links were timed: {failed}")
    return result


def _short_of_disk(config: Config, cost: Cost, facts: list[Facts]) -> list[str]:
    """Return a warning if rank 0's disk is too small; all hosts are assumed to write there."""
    kept = config.checkpoint.keep_last + 2  # with the best one and the one being written
    needed = STATE * cost.parameters * kept
    if facts[0].disk >= needed:
        return []
    return [
        f"{facts[0].host}: {_size(facts[0].disk)} are free for train.output, but its "
        f"{kept} checkpoints may take {_size(needed)} (checkpoint.keep_last)"
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def summary_line(checked: Checked) -> str:
    """Return the line of a start without problems."""
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
