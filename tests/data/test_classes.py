"""Labels are matched by the names of classes, not by their places in a sorted list."""

import pytest

from swin_moe.config import DataConfig
from swin_moe.data.classes import match
from swin_moe.data.source import open_source
from tests.data.helpers import NO_AUGMENT, make_folder, make_shards, open_loader


def labels(loader):
    return [label for batch in loader.epoch(0) for label in batch.targets.tolist() if label >= 0]


def test_a_held_out_set_that_lacks_a_class_keeps_the_labels_of_the_others(tmp_path, caplog):
    make_folder(tmp_path / "val", ["dog", "fox"])
    loader = open_loader(tmp_path, training=False, classes=["cat", "dog", "fox"])
    assert labels(loader) == [1, 1, 2, 2]
    assert loader.class_names == ["cat", "dog", "fox"]
    assert loader.missing_classes == ["cat"]
    assert "no sample of 1 of the 3 classes of the model ('cat')" in caplog.text


def test_another_order_is_mapped(tmp_path):
    make_folder(tmp_path / "train", ["a", "b", "c"])
    source = open_loader(tmp_path, NO_AUGMENT, classes=["c", "a", "b"])
    assert [source.label(index) for index in range(6)] == [1, 1, 2, 2, 0, 0]
    assert source.classes_seen == 3


def test_unknown_classes_are_refused_by_name(tmp_path):
    make_folder(tmp_path / "val", ["[cat]", "dog"])
    message = (
        r"data\.path=.*, data\.val=val: the model lacks 1 of its classes: '\[cat\]'\. "
        r"It has 2: 'cat', 'dog'\. Rename .* data\.match_classes=number"
    )
    with pytest.raises(ValueError, match=message):
        open_loader(tmp_path, training=False, classes=["cat", "dog"])
    loader = open_loader(tmp_path, training=False, classes=["cat", "dog"], match_classes="number")
    assert labels(loader) == [0, 0, 1, 1]


def test_two_classes_of_one_name_cannot_be_matched(tmp_path):
    make_folder(tmp_path / "val", ["crane", "dog"])
    with pytest.raises(ValueError, match="the model's name 'crane' stands twice"):
        open_loader(tmp_path, training=False, classes=["crane", "crane", "dog"])


def test_data_without_names_keep_their_numbers_with_a_warning(tmp_path, caplog):
    make_folder(tmp_path / "a", ["x", "y"])
    (tmp_path / "val").write_text("a/y/0.png\t1\na/x/0.png\t0\n")
    loader = open_loader(tmp_path, training=False, classes=["cat", "dog"])
    assert labels(loader) == [1, 0]
    assert "its classes have no names" in caplog.text


def test_a_list_of_names_for_numbers_may_rename_some(tmp_path, caplog):
    make_shards(tmp_path, 3, split="val", shards=1)
    names = tmp_path / "classes.txt"
    names.write_text("[/cat]\ndog\nfox\n")
    loader = open_loader(tmp_path, training=False, classes=["[cat]", "dog", "fox"])
    assert labels(loader) == [0, 1, 2]
    assert loader.class_names == ["[cat]", "dog", "fox"]
    assert "calls 1 of the 3 classes differently ('[cat]'); its labels are numbers" in caplog.text
    names.write_text("dog\ncow\nfox\n")  # a name of the model's at another place
    with pytest.raises(ValueError, match="lacks 1 of its classes: 'cow'"):
        open_loader(tmp_path, training=False, classes=["[cat]", "dog", "fox"])


def test_a_name_without_samples_may_be_unknown():
    class Source:
        runs, passed_over, numbered, max_pixels = None, "", False, 1
        describe = key = read = None

    import numpy as np

    source = Source()
    source.class_names = ["a", "b", "z"]
    source.labels, source.class_counts = np.array([1, 0, 1]), np.array([1, 2])
    found = match(source, ["b", "a"], "data.val=val")
    assert found.labels.tolist() == [0, 1, 0]
    assert found.class_counts.tolist() == [2, 1]


def test_held_out_folders_must_be_those_of_training_where_numbers_count(tmp_path):
    make_folder(tmp_path / "train", ["a", "b", "c"])
    make_folder(tmp_path / "val", ["a", "c"])
    with pytest.raises(ValueError, match="differ in 1 class folders, first 'b'"):
        open_loader(tmp_path, training=False, classes=["x", "y", "z"], match_classes="number")


def test_a_list_shorter_than_the_labels_is_refused(tmp_path):
    make_shards(tmp_path, 3, split="val", shards=1)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="2 class names, but a label is 2"):
        open_loader(tmp_path, training=False, classes=["a", "b", "c"])


def test_a_file_as_data_path_is_called_a_file(tmp_path):
    (tmp_path / "d.zip").touch()
    with pytest.raises(ValueError, match=r"d\.zip is a file: give the folder that it is in"):
        open_loader(tmp_path / "d.zip")


def test_names_for_a_model_with_only_numbers_are_reported(tmp_path, caplog):
    make_folder(tmp_path / "val", ["0", "1", "10", "2"])
    (tmp_path / "train").write_text("val/0/0.png\t0\n")
    open_loader(tmp_path, training=False)
    assert "classes have no names, so labels count as places in this data set's list" in caplog.text
    assert "4 classes: label 2 is class '10'" in caplog.text


def test_numbers_for_classes_named_by_numbers_in_another_order_are_reported(tmp_path, caplog):
    make_folder(tmp_path / "a", ["0", "1", "10", "2"])
    (tmp_path / "val").write_text("a/2/0.png\t2\n")
    open_loader(tmp_path, training=False, classes=["0", "1", "10", "2"])
    assert "places in the model's list of 4 classes: label 2 is class '10'" in caplog.text


def test_accents_that_macos_writes_apart_are_the_same_name(tmp_path):
    make_folder(tmp_path / "val", ["cafe\u0301", "bar"])
    loader = open_loader(tmp_path, training=False, classes=["caf\u00e9", "bar"])
    assert labels(loader) == [1, 1, 0, 0]


def test_two_classes_that_look_alike_are_reported(tmp_path, caplog):
    make_folder(tmp_path / "train", ["caf\u00e9", "cafe\u0301"])
    open_loader(tmp_path, num_classes=2)
    assert "two classes look alike, 'caf" in caplog.text


def test_an_empty_class_that_the_model_lacks_is_named(tmp_path):
    make_folder(tmp_path / "train", ["a", "b"])
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(ValueError, match=r"the last, 'c', has no sample: set model\.num_classes=3"):
        open_source(DataConfig(path=str(tmp_path)), 2, True)
