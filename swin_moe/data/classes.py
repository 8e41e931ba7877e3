"""Matching the classes of a data set with those of a model, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..common.text import plain
from .files import Bounded
from .names import finder, other_numbers

if TYPE_CHECKING:
    from .files import Source

SHOWN = 3  # names in a message


class Relabelled(Bounded):
    """A source with labels of another list of classes.

    Args:
        classes: the other list.
        place: [classes of the source] int32, the place of each of its classes in that list.
    """

    def __init__(self, source: Source, classes: list[str], place: np.ndarray) -> None:
        self._source = source
        self.describe, self.key, self.read = source.describe, source.key, source.read
        self.class_names: list[str] | None = classes
        self.labels = place[source.labels]
        self.runs, self.passed_over = source.runs, source.passed_over
        self.max_pixels = source.max_pixels
        self.class_counts = np.zeros(len(classes), source.class_counts.dtype)
        known = place[: len(source.class_counts)] >= 0
        self.class_counts[place[: len(source.class_counts)][known]] = source.class_counts[known]

    def __len__(self) -> int:
        return len(self._source)


def match(source: Source, classes: list[str], split: str) -> Source:
    """Return the source with labels that are places in ``classes``, matched by name.

    A data set without names keeps its labels. So does one whose labels are numbers and whose list
    of names renames some classes; see :func:`difference`.

    Args:
        source: of the data set.
        classes: the model's names by label.
        split: the config keys and their values, for messages.

    Raises:
        ValueError: it has samples of a class that is not among ``classes``, or two classes have
            the same name.
    """
    theirs = source.class_names
    if theirs is None or theirs == classes:
        return source
    if source.numbered and _is_renamed(theirs, classes):
        same = Relabelled(source, classes, np.arange(len(classes), dtype=np.int32))
        same.renamed = [ours for ours, name in zip(classes, theirs, strict=True) if name != ours]
        return same
    counts = np.zeros(len(theirs), np.int64)
    counts[: len(source.class_counts)] = source.class_counts
    return Relabelled(source, classes, _places(theirs, counts, classes, split))


def difference(source: Source, classes: list[str]) -> str:
    """Return a note on a held-out split after :func:`match`; empty if it has all classes."""
    if source.renamed:
        return (
            f"its list calls {len(source.renamed):,} of the {len(classes):,} classes differently "
            f"({quoted(source.renamed)}); its labels are numbers, and these count"
        )
    if source.class_names is None:
        return (
            "its classes have no names, so its labels count as places in the model's list of "
            f"{len(classes):,} classes{other_numbers(classes)}"
        )
    present = set(np.flatnonzero(source.class_counts).tolist())
    missing = [name for label, name in enumerate(classes) if label not in present]
    if not missing:
        return ""
    return (
        f"no sample of {len(missing):,} of the {len(classes):,} classes of the model "
        f"({quoted(missing)}); the others are matched by name"
    )


def places_as_labels(source: Source) -> str:
    """Return a note on a held-out split with class names, for a model without them."""
    names = source.class_names
    if names is None or source.numbered:
        return ""
    return (
        "the model's classes have no names, so labels count as places in this data set's list of "
        f"{len(names):,} classes{other_numbers(names)}"
    )


def _is_renamed(theirs: list[str], ours: list[str]) -> bool:
    """Return whether two lists differ, but every name in both has the same place."""
    known = {name: place for place, name in enumerate(ours)}
    places = [known.get(name, place) == place for place, name in enumerate(theirs)]
    return len(theirs) == len(ours) and all(places) and not known.keys().isdisjoint(theirs)


def _places(theirs: list[str], counts: np.ndarray, classes: list[str], split: str) -> np.ndarray:
    for names, whose in ((theirs, "its"), (classes, "the model's")):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"{split}: its classes differ from the model's, and {whose} name '{plain(twice)}' "
                "stands twice, so they cannot be matched: give each class a name of its own, or "
                "set data.match_classes=number if the numbers agree"
            )
    place = np.array(list(map(finder(classes), theirs)), np.int32)
    foreign = [theirs[label] for label in np.flatnonzero((place < 0) & (counts > 0))]
    if foreign:
        raise ValueError(
            f"{split}: the model lacks {len(foreign)} of its classes: {quoted(foreign)}. "
            f"It has {len(classes)}: {quoted(classes)}. Rename or remove them, or set "
            "data.match_classes=number if the numbers agree"
        )
    return place


def quoted(names: Sequence[str]) -> str:
    """Return the first names in quotes, with an ellipsis if there are more."""
    shown = ", ".join(f"'{plain(name)}'" for name in names[:SHOWN])
    return shown + ", …" * (len(names) > SHOWN)
