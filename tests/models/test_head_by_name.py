"""The head of a pretrained file: its classes are matched by name, and a note reports the result."""

import pytest
import torch

from swin_moe.models import SwinTransformer
from swin_moe.weights.files import WeightsError
from swin_moe.weights.pretrained import head_by_name, load_pretrained, read_pretrained
from tests.models.test_dialects import config

STATE = {"head.weight": torch.arange(6.0).view(3, 2), "head.bias": torch.arange(3.0)}
NAMES = ["cat", "dog", "fox"]


def test_rows_follow_the_names():
    state, note = head_by_name(STATE, NAMES, ["fox", "cat"])
    assert state["head.bias"].tolist() == [2, 0]
    assert state["head.weight"].tolist() == [[4, 5], [0, 1]]
    assert note == "of 3 classes, 2 taken by name"


def test_the_same_or_unknown_names_leave_the_head_unchanged():
    for theirs, ours in [(NAMES, NAMES), (None, NAMES), (NAMES, None)]:
        state, note = head_by_name(STATE, theirs, ours)
        assert state is STATE
        assert note == ""


def test_accents_written_either_way_are_the_same_class():
    state, note = head_by_name(STATE, ["cat", "caf\u00e9", "fox"], ["cafe\u0301", "fox"])
    assert state["head.bias"].tolist() == [1, 2]
    assert note == "of 3 classes, 2 taken by name"


def test_numbers_as_names_are_not_taken_for_places_in_silence():
    numbers = ["1", "10", "2"]
    for theirs, ours in [(None, numbers), (numbers, None)]:
        state, note = head_by_name(STATE, theirs, ours)
        assert state is STATE
        assert note == "taken by number: label 0 is class '1'"


def test_data_with_fewer_names_than_the_model_has_classes(tmp_path):
    model = SwinTransformer(config("swinv2", depths=[1, 1], num_heads=[2, 4]))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    source = read_pretrained(tmp_path / "x.pth")
    classes = model.config.num_classes
    source.class_names = [f"c{number}" for number in range(classes)]
    note = load_pretrained(model, source, ["c1"])
    assert note.endswith(f"head re-initialised for {classes} classes (the data name 1 of them)")


def test_a_head_that_lacks_a_class_is_not_taken():
    state, note = head_by_name({**STATE, "norm.bias": torch.zeros(2)}, NAMES, ["cat", "cow", "dog"])
    assert set(state) == {"norm.bias"}
    assert note == (
        "re-initialised for 3 classes (the file's 3 lack 1 of them, first 'cow'; "
        "data.match_classes=number takes it as it is)"
    )
    state, note = head_by_name(STATE, ["cat", "cat", "fox"], ["fox", "cat"])
    assert state == {}
    assert "the file names two alike" in note


def test_a_head_that_is_absent_or_another_one_is_reported(tmp_path):
    model = SwinTransformer(config("swinv2", depths=[1, 1], num_heads=[2, 4]))
    weights = model.state_dict()
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}

    def loaded(state):
        torch.save(state, tmp_path / "x.pth")
        return load_pretrained(model, read_pretrained(tmp_path / "x.pth"))

    assert loaded(body).endswith("head re-initialised (the file has none)")
    note = loaded(body | {"head.1.weight": weights["head.weight"]})
    assert note.endswith("head re-initialised (the file has another one: head.1.weight …)")
    with pytest.raises(WeightsError, match=r"not in the model \(head.norm.weight"):
        loaded(weights | {"head.norm.weight": torch.ones(1)})
    assert "head" not in loaded(weights)
