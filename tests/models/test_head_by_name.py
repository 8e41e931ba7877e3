"""The head of a pretrained file goes to the classes of the same names."""

import torch

from swin_moe.models.pretrained import head_by_name

STATE = {"head.weight": torch.arange(6.0).view(3, 2), "head.bias": torch.arange(3.0)}
NAMES = ["cat", "dog", "fox"]


def test_rows_follow_the_names():
    state, said = head_by_name(STATE, NAMES, ["fox", "cat"])
    assert state["head.bias"].tolist() == [2, 0]
    assert state["head.weight"].tolist() == [[4, 5], [0, 1]]
    assert said == "of 3 classes, 2 taken by name"


def test_the_same_or_unknown_names_leave_the_head_as_it_is():
    for theirs, ours in [(NAMES, NAMES), (None, NAMES), (NAMES, None)]:
        state, said = head_by_name(STATE, theirs, ours)
        assert state is STATE
        assert said == ""


def test_a_head_that_lacks_a_class_is_not_taken():
    state, said = head_by_name({**STATE, "norm.bias": torch.zeros(2)}, NAMES, ["cat", "cow", "dog"])
    assert set(state) == {"norm.bias"}
    assert said == (
        "re-initialised for 3 classes (the file's 3 lack 1 of them, first 'cow'; "
        "data.match_classes=number takes it as it is)"
    )
    state, said = head_by_name(STATE, ["cat", "cat", "fox"], ["fox", "cat"])
    assert state == {}
    assert "the file names two alike" in said
