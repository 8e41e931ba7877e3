"""A resume reports changes, and refuses other data."""

import re
from types import SimpleNamespace

import pytest

from swin_moe.config import validate
from swin_moe.training.changes import changed_keys, data_facts, other_data, summary


def config(**data):
    return validate({"model": {"name": "swinv2"}, "data": data})


def loader(samples, classes, missing=()):
    return SimpleNamespace(num_samples=samples, classes_seen=classes, missing_classes=list(missing))


def test_changes_are_listed_by_key():
    old, new = config(path="a"), config(path="b #2")
    new.optimizer.base_lr, new.train.output = 1e-4, "elsewhere"
    line = summary(changed_keys(old, new), 135)
    assert line == "changed since step 135: data.path a → b #2, optimizer.base_lr 0.0005 → 0.0001"
    assert changed_keys(old, old) == []
    assert summary([f"k{i}" for i in range(11)], 1).endswith("k7 and 3 more")


@pytest.mark.parametrize(
    ("now", "path", "why"),
    [
        (loader(100, 3), "a", ""),
        (loader(90, 3), "a", ""),  # cleaned
        (loader(100, 3), "b", ""),  # moved
        (loader(90, 3), "b", r"path=b has 90 training samples; .* data.path=a with 100"),
        (loader(90, 2, ["cat"]), "a", r"a has training samples of 2 classes \(none of 'cat'"),
        (loader(120, 4), "a", r"of 4 classes; the checkpoint was trained on 3"),
    ],
)  # fmt: skip
def test_other_data_are_known_by_classes_and_by_place_and_size(now, path, why):
    facts = data_facts(loader(100, 3))
    found = other_data(config(path="a"), config(path=path), facts, now)
    assert bool(found) == bool(why)
    assert re.search(why, found)
    assert other_data(config(path="a"), config(path=path), None, now) == ""  # from an older version
