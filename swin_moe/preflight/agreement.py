"""Compares all processes of a run; some differences are refused, others are warnings."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..config import Config
from ..distributed.meeting import Meeting, spans
from .facts import Facts, collect

# Differences that break a run, or change it silently; and how to mend them.
REFUSED = {
    "config": "start every process with the same config and overrides",
    "swin_moe": "install the same version everywhere",
    "source": "use the same checkout everywhere",
    "compiled ops": "build them from the same source everywhere, or copy swin_moe/_C*.so",
    "torch": "install requirements/lock.txt everywhere",
    "DeepSpeed": "install requirements/lock.txt everywhere",
    "backend": "a host without its GPUs, or with another build of torch, cannot take part",
    "NCCL": "install requirements/lock.txt everywhere",
}
TAKEN = 0.1  # share of a GPU's memory that other programs may hold


@dataclass(frozen=True)
class Agreement:
    """The facts of all processes by rank, and their differences; the same on every rank."""

    facts: list[Facts]
    problems: list[str]
    warnings: list[str]


def agree(config: Config, meeting: Meeting) -> Agreement:
    """Compare all processes, before they make any group.

    Raises:
        TimeoutError: some processes did not come.
    """
    mine = collect(config)
    keys = _flat(config.model_dump())
    text = json.dumps(keys) if meeting.rank == 0 else ""
    common = json.loads(meeting.exchange("config", text, lambda texts: texts[0]))
    different = {
        key: [keys.get(key, "nothing"), common.get(key, "nothing")]
        for key in {**common, **keys}
        if keys.get(key) != common.get(key)
    }
    text = json.dumps([asdict(mine), different])
    facts, problems, warnings = json.loads(meeting.exchange("versions", text, _judge))
    return Agreement([Facts(**one) for one in facts], problems, warnings)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a config as text, by dotted keys."""
    result: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = str(value)
    return result


def _judge(texts: list[str]) -> str:
    pairs = [json.loads(text) for text in texts]
    facts = [Facts(**one) for one, _ in pairs]
    problems, warnings = compare(facts, [different for _, different in pairs])
    return json.dumps([[one for one, _ in pairs], problems, warnings])


def compare(facts: list[Facts], keys: list[dict[str, list[str]]]) -> tuple[list[str], list[str]]:
    """Return lines about the differences: problems, and warnings.

    Args:
        facts: by rank.
        keys: by rank, the config's keys that differ from rank 0's, with the rank's value and rank
            0's.
    """
    problems, warnings = [], []
    for name in facts[0].versions:
        for line in _odd_ones(facts, name, keys):
            if name in REFUSED:
                problems.append(f"{line}: {REFUSED[name]}")
            else:
                warnings.append(line)
    gpus = Counter(fact.gpu for fact in facts if fact.gpu)
    for gpu, count in gpus.items():
        if count > 1:
            ranks = [rank for rank, fact in enumerate(facts) if fact.gpu == gpu]
            problems.append(
                f"{named(facts, ranks)}: {count} processes share one GPU: start one for each GPU"
            )
    return problems, warnings + _short_of_memory(facts)


def _odd_ones(facts: list[Facts], name: str, keys: list[dict[str, list[str]]]) -> list[str]:
    """Return a line for each value that is not the most frequent one; rank 0's wins a tie."""
    by_value: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        by_value.setdefault(fact.versions[name], []).append(rank)
    usual = max(by_value, key=lambda value: len(by_value[value]))  # the first of equals is rank 0's
    lines = []
    for value, ranks in by_value.items():
        if value == usual:
            continue
        these, those = named(facts, ranks), named(facts, by_value[usual])
        theirs, ours = keys[ranks[0]], keys[by_value[usual][0]]
        if name == "config" and (theirs or ours):
            key = next(iter(theirs or ours))
            mine, other = theirs[key] if theirs else ours[key][::-1]
            lines.append(f"{these}: {key}={mine}, but {those} has {other}")
        elif name == "source":
            commits = [facts[group[0]].versions["commit"] for group in (ranks, by_value[usual])]
            lines.append(
                f"{these}: swin_moe's source is {value} (commit {commits[0]}), but {those} has "
                f"{usual} (commit {commits[1]})"
            )
        else:
            lines.append(f"{these}: {name} {value}, but {those} has {usual}")
    return lines


def _short_of_memory(facts: list[Facts]) -> list[str]:
    lines = []
    for rank, fact in enumerate(facts):
        if fact.gpu_total and fact.gpu_free < (1 - TAKEN) * fact.gpu_total:
            taken, total = (fact.gpu_total - fact.gpu_free) / 1e9, fact.gpu_total / 1e9
            lines.append(
                f"{named(facts, [rank])}: {taken:.1f} of its GPU's {total:.1f} GB are taken by "
                "other programs"
            )
    usual = statistics.median(fact.memory for fact in facts)
    hosts = {fact.host: fact.memory for fact in facts if fact.memory < usual / 2}
    for host, memory in hosts.items():
        lines.append(
            f"{host}: {memory / 1e9:.1f} GB of memory are free, but {usual / 1e9:.1f} GB elsewhere"
        )
    return lines


def named(facts: list[Facts], ranks: list[int]) -> str:
    """Return the hosts of ``ranks``, with the ranks if a host also has others."""
    chosen = set(ranks)
    hosts = list(dict.fromkeys(facts[rank].host for rank in ranks))
    if any(fact.host in hosts and rank not in chosen for rank, fact in enumerate(facts)):
        shown = {host: [r for r in ranks if facts[r].host == host] for host in hosts}
        hosts = [f"{host} ({spans(some)})" for host, some in shown.items()]
    more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
    return ", ".join(hosts[:3]) + more
