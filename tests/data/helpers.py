"""Small data sets for the tests of the data path."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from swin_moe.config import AugmentConfig, Config, DataConfig, ModelConfig
from swin_moe.config.sections import TrainConfig
from swin_moe.data import Loader, loader_of

NO_AUGMENT = AugmentConfig(
    scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0, color_jitter=0, auto_augment="", random_erase=0
)
FORMATS = {"jpg": "JPEG"}


def encode(seed: int, size: int = 12, extension: str = "png") -> bytes:
    """Encode a random colour image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, FORMATS.get(extension, extension.upper()))
    return buffer.getvalue()


def samples(count: int, start: int = 0) -> list[tuple[str, bytes, int]]:
    """Make samples whose label is their number, so that a label identifies its sample."""
    return [(f"key{i:04d}", encode(i), i) for i in range(start, start + count)]


def write_shard(
    path: Path, content: Iterable[tuple[str, bytes, int]], extension: str = "png"
) -> None:
    """Write ``(key, image, label)`` as ``key.png`` and ``key.cls``; ``….gz`` is compressed."""
    opened = gzip.open if path.name.endswith("gz") else open
    with opened(path, "wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        for key, image, label in content:
            tar.write({"__key__": key, extension: image, "cls": str(label).encode()})


def make_shards(root: Path, count: int, split: str = "train", shards: int = 2) -> Path:
    """Write plain shards ``split-0.tar``… of ``count`` samples, numbered consecutively."""
    root.mkdir(exist_ok=True)
    cuts = np.linspace(0, count, shards + 1).astype(int).tolist()
    for shard, (start, stop) in enumerate(pairwise(cuts)):
        write_shard(root / f"{split}-{shard}.tar", samples(stop - start, start))
    return root


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar that is being written."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_folder(root: Path, classes: Iterable[str], per_class: int = 2) -> Path:
    """Write images in class folders."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.png").write_bytes(encode(10 * number + i))
    return root


def data_config(path: Path | str, **values: Any) -> DataConfig:
    values = {"batch_size": 4, "num_workers": 0} | values
    return DataConfig(path=str(path), **values)


def loading(data: DataConfig, augment: AugmentConfig, seed: int = 0, **model: Any) -> Config:
    """Return a config for a loader; its model is not built, and may have any size."""
    sections = {"data": data, "augment": augment, "train": TrainConfig(seed=seed)}
    return Config().model_copy(update={**sections, "model": ModelConfig.model_construct(**model)})


OPENED: list[Loader] = []


def open_loader(
    path: Path | str,
    augment: AugmentConfig = NO_AUGMENT,
    *,
    training: bool = True,
    rank: int = 0,
    world_size: int = 1,
    num_classes: int = 1000,
    seed: int = 5,
    classes: list[str] | None = None,
    **values: Any,
) -> Loader:
    """Open a loader that is closed at the end of the test, see ``conftest.py``."""
    data = data_config(path, **values)
    config = loading(data, augment, seed, img_size=16, num_classes=num_classes)
    loader = loader_of(config, training, rank, world_size, classes)
    OPENED.append(loader)
    return loader
