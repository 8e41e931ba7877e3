"""Changes of config and data between a checkpoint and the start that resumes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..common.text import plain
from ..config import Config
from ..data.classes import quoted

if TYPE_CHECKING:
    from ..data import Loader

SHOWN = 8  # changes in one line
_PATHS = ("path", "train", "val")


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return ``section.key old → new`` for each key that differs, except ``train.output``."""
    changes = []
    before, now = old.model_dump(), new.model_dump()
    for section, values in now.items():
        for key, value in values.items():
            former = before[section].get(key)
            if former != value and (section, key) != ("train", "output"):
                changes.append(f"{section}.{key} {_shown(former)} → {_shown(value)}")
    return changes


def summary(changes: list[str], step: int) -> str:
    """Return one line for the terminal: the first changes, and the number of the others."""
    more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return f"changed since step {step}: {', '.join(changes[:SHOWN])}{more}"


def _shown(value: Any) -> str:
    text = plain(value) if isinstance(value, str) else str(value)
    return f"{text or repr(text)}"[:60]


def data_facts(train: Loader) -> dict[str, int]:
    """Return the numbers of samples and classes, by which training sets are compared."""
    return {"samples": train.num_samples, "classes": train.classes_seen}


def other_data(old: Config, new: Config, facts: dict[str, Any] | None, train: Loader) -> str:
    """Return how the training data differ from the checkpoint's, "" if they do not.

    A set at the same path may have more or fewer samples, but not classes. A set at another path
    must have the same numbers of samples and classes.

    Args:
        facts: :func:`data_facts` of the checkpoint; None in checkpoints of older versions.
    """
    here = data_facts(train)
    if facts is None or here.items() <= facts.items():
        return ""
    if here["classes"] != facts["classes"]:
        without = f" (none of {quoted(train.missing_classes)})" if train.missing_classes else ""
        return (
            f"data.path={plain(new.data.path)} has training samples of {here['classes']:,} "
            f"classes{without}; the checkpoint was trained on {facts['classes']:,}"
        )
    moved = [key for key in _PATHS if getattr(old.data, key) != getattr(new.data, key)]
    if not moved:
        return ""
    before, now = (plain(getattr(config.data, moved[0])) for config in (old, new))
    return (
        f"data.{moved[0]}={now} has {here['samples']:,} training samples; the checkpoint was "
        f"trained on data.{moved[0]}={before} with {facts['samples']:,}"
    )
