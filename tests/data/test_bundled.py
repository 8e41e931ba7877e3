from pathlib import Path

import numpy as np
import pytest
import webdataset

from swin_moe.data.decode import EncodedImage
from swin_moe.data.readers.shards import find_shards, open_shards
from swin_moe.data.source import BUNDLED

from .helpers import open_loader

ROOT = BUNDLED["fashion_mnist"]
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt"]
CLASSES += ["Sneaker", "Bag", "Ankle boot"]


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("val", 200)])
def test_split_is_complete_and_balanced(split, per_class):
    paths = find_shards(str(ROOT / split))
    source = open_shards(paths, None)
    assert np.bincount(source.labels).tolist() == [per_class] * 10
    contents = {source.read(index) for index in range(len(source))}
    assert len(contents) > 0.98 * len(source)  # Fashion-MNIST itself has a few duplicates
    for index in range(0, len(source), 50):
        assert EncodedImage(source.read(index), "L").pixels().shape == (28, 28, 1)
    read = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode("pil")
    count = 0
    for sample, label in zip(read, source.labels, strict=True):
        assert sample["cls"] == label
        assert sample["png"].size == (28, 28)
        count += 1
    assert count == 10 * per_class


def test_size_names_and_licence():
    assert sum(path.stat().st_size for path in ROOT.iterdir()) <= 12e6
    assert (ROOT / "classes.txt").read_text().splitlines() == CLASSES
    licence = (ROOT / "LICENSE-fashion-mnist").read_text()
    assert "Zalando SE" in licence
    assert "MIT" in licence


def test_opens_by_name():
    loader = open_loader("fashion_mnist", training=False, num_classes=10)
    assert loader.num_samples == 2000
    assert loader.class_names == CLASSES
    assert "2,000 samples, 10 classes" in loader.description
    batch = next(loader.epoch(0))
    assert batch.inputs["images"].shape == (4, 3, 16, 16)


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fashion_mnist").mkdir()
    with pytest.raises(ValueError, match=r"data\.train=train: found no fashion_mnist/train"):
        open_loader("fashion_mnist")
