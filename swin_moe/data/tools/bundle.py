"""Writer of the bundled sample: Fashion-MNIST as gzip-compressed webdataset shards.

``python -m swin_moe.data.tools.bundle --source DIR --output DIR`` writes
``swin_moe/data/fashion_mnist`` from the four IDX files of
https://github.com/zalandoresearch/fashion-mnist (Debian:
``apt install dataset-fashion-mnist``). The same input and the same zlib give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

DEBIAN_PATH = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SPLITS = {"train": ("train", 10_000), "val": ("t10k", 2_000)}  # ours -> (theirs, samples)
SHARD_SAMPLES = 2_500
SEED = 0


def read_idx(path: Path) -> np.ndarray:
    """Read one gzip-compressed IDX file of unsigned bytes: images [N, 28, 28] or labels [N].

    Raises:
        ValueError: the file is missing, or no IDX file of unsigned bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot read the IDX file ({error})") from None
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    dims = data[3]
    shape = np.frombuffer(data, dtype=">u4", count=dims, offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape.tolist())


def balanced_sample(labels: np.ndarray, count: int, seed: int = SEED) -> np.ndarray:
    """Return shuffled row numbers [count], equally many of each class of ``labels`` [N]."""
    rng = np.random.default_rng(seed)
    per_class = count // len(CLASSES)
    rows = [
        rng.choice(np.flatnonzero(labels == label), per_class, replace=False)
        for label in range(len(CLASSES))
    ]
    return rng.permutation(np.concatenate(rows))


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode grey ``pixels`` [H, W] uint8 as the smallest PNG that Pillow makes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_shard(
    path: Path, samples: Iterable[tuple[str, bytes, int]], extension: str = "png"
) -> None:
    """Write ``(key, image, label)`` as ``key.png`` and ``key.cls`` with fixed metadata.

    A name that ends in ``gz`` compresses: tar's 512-byte blocks are larger than small images.
    """
    archive = io.BytesIO()
    with webdataset.TarWriter(archive, encoder=False, user="root", group="root", mtime=0) as tar:
        for key, image, label in samples:
            tar.write({"__key__": key, extension: image, "cls": str(label).encode()})
    with open(path, "wb") as raw:
        if path.name.endswith("gz"):
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                packed.write(archive.getvalue())
        else:
            raw.write(archive.getvalue())


def prepare_fashion_mnist(source: Path, output: Path) -> None:
    """Sample 10,000 training and 2,000 test images and write shards and ``classes.txt``.

    Args:
        source: folder with the four ``*-ubyte.gz`` files.
        output: folder to write to; created if it is missing.

    Raises:
        ValueError: a source file is missing or damaged.
    """
    output.mkdir(parents=True, exist_ok=True)
    for split, (name, count) in SPLITS.items():
        images = read_idx(source / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz")
        rows = balanced_sample(labels, count)
        for shard, start in enumerate(range(0, count, SHARD_SAMPLES)):
            samples = [
                (f"{row:05d}", encode_png(images[row]), int(labels[row]))  # key: row of the source
                for row in rows[start : start + SHARD_SAMPLES]
            ]
            write_shard(output / f"{split}-{shard:03d}.tar.gz", samples)
    (output / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m swin_moe.data.tools.bundle", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--source", type=Path, default=DEBIAN_PATH, help="folder of the IDX files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "fashion_mnist")
    arguments = parser.parse_args()
    try:
        prepare_fashion_mnist(arguments.source, arguments.output)
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
