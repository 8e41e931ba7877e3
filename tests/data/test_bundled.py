import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from swin_moe.data.decode import EncodedImage
from swin_moe.data.readers.shards import find_shards, open_shards
from swin_moe.data.source import BUNDLED
from swin_moe.data.tools import bundle

from .helpers import open_loader

ROOT = BUNDLED["fashion_mnist"]


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
    assert (ROOT / "classes.txt").read_text().splitlines() == list(bundle.CLASSES)
    licence = (ROOT / "LICENSE-fashion-mnist").read_text()
    assert "Zalando SE" in licence
    assert "MIT" in licence


def test_opens_by_name():
    loader = open_loader("fashion_mnist", training=False, num_classes=10)
    assert loader.num_samples == 2000
    assert loader.class_names == list(bundle.CLASSES)
    assert "2,000 samples, 10 classes" in loader.description
    batch = next(loader.epoch(0))
    assert batch.inputs["images"].shape == (4, 3, 16, 16)


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fashion_mnist").mkdir()
    with pytest.raises(ValueError, match=r"data\.train=train: found no fashion_mnist/train"):
        open_loader("fashion_mnist")


def _write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(bundle.gzip.compress(header + values.tobytes()))


def test_prepare_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(bundle, "SPLITS", {"train": ("train", 60), "val": ("t10k", 20)})
    monkeypatch.setattr(bundle, "SHARD_SAMPLES", 30)
    for name in ("train", "t10k"):
        images = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8)
        labels = np.arange(100, dtype=np.uint8) % 10
        _write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        _write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    bundle.prepare_fashion_mnist(tmp_path, tmp_path / "a")
    bundle.prepare_fashion_mnist(tmp_path, tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["classes.txt", "train-000.tar.gz", "train-001.tar.gz", "val-000.tar.gz"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    source = open_shards(find_shards(str(tmp_path / "a" / "train")), None)
    assert np.bincount(source.labels).tolist() == [6] * 10


@pytest.mark.skipif(not bundle.DEBIAN_PATH.is_dir(), reason="needs dataset-fashion-mnist")
def test_bundled_files_come_from_the_script(tmp_path):
    bundle.prepare_fashion_mnist(bundle.DEBIAN_PATH, tmp_path)
    ours = open_shards(find_shards(str(ROOT / "val")), None)
    theirs = open_shards(find_shards(str(tmp_path / "val")), None)
    assert ours.labels.tolist() == theirs.labels.tolist()


def test_prepare_names_a_missing_or_wrong_source(tmp_path):
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: cannot read"):
        bundle.prepare_fashion_mnist(tmp_path, tmp_path / "out")
    shutil.copy(ROOT / "val-000.tar.gz", tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match="not an IDX file"):
        bundle.prepare_fashion_mnist(tmp_path, tmp_path / "out")
