"""Images a second and core: our data path compared with PIL + timm from a folder, and webdataset.

All do the same to the same JPEGs on one core: decode, RandomResizedCrop(192), flip, RandAugment as
the Swin recipes have it (or none), normalise, batch. Ours ends on the device, where training
normalises; here that is the same core. The contenders run in turn in one process; figures are
medians of the time for a batch. Then the epoch's order and the index at ImageNet-22K's size.

    python -m benchmarks.loader [--json PATH] [--quick]
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from timm.data import create_transform
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder

from benchmarks import harness
from benchmarks.photos import jpeg
from swin_moe.config import AugmentConfig, DataConfig
from swin_moe.data import loader_of
from swin_moe.data.normalise import Normalise
from swin_moe.data.rng import seeded
from swin_moe.data.sampler import ResumableSampler
from swin_moe.data.transforms import TrainTransform
from tests.data.helpers import loading, write_shard

SIDE, BATCH, CLASSES = 192, 32, 8
SIZES = {"500×375": (500, 375), "1000×750": (1000, 750)}
POLICY = "rand-m9-mstd0.5-inc1"
IMAGENET_22K = 14_197_122
Contender = Callable[[], torch.Tensor]


def write_data(root: Path, size: tuple[int, int]) -> None:
    """Write the same images as a folder and as a shard."""
    images = [jpeg(seed, *size) for seed in range(2 * BATCH)]
    for index, data in enumerate(images):
        folder = root / "folder" / f"n{index % CLASSES:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(data)
    samples = [(f"{i:04d}", data, i % CLASSES) for i, data in enumerate(images)]
    write_shard(root / "train-0.tar", samples, extension="jpg")


def transform(policy: str) -> Callable[[Image.Image], torch.Tensor]:
    """Return timm's transform with the settings of the Swin recipes."""
    return create_transform(
        SIDE, is_training=True, auto_augment=policy or None, color_jitter=0.0,
        interpolation="bicubic",
    )  # fmt: skip


def ours(root: Path, split: str, policy: str) -> Contender:
    augment = AugmentConfig(auto_augment=policy, color_jitter=0, random_erase=0)
    data = DataConfig(path=str(root), train=split, batch_size=BATCH, num_workers=0)
    config = loading(data, augment, img_size=SIDE, num_classes=CLASSES)
    loader = loader_of(config, training=True)
    normalise = Normalise(data.mean, data.std)

    def batches() -> Iterator[torch.Tensor]:
        epoch = 0
        while True:
            for batch in loader.epoch(epoch):
                yield normalise(batch.inputs["images"])
            epoch += 1

    stream = batches()
    return lambda: next(stream)


def timm_from_folder(root: Path, policy: str) -> Contender:
    dataset = ImageFolder(str(root / "folder"), transform(policy))
    order = cycle(np.random.default_rng(0).permutation(len(dataset)).tolist())
    return lambda: default_collate([dataset[i] for i in islice(order, BATCH)])[0]


def timm_from_webdataset(root: Path, policy: str) -> Contender:
    pipeline = (
        webdataset.WebDataset(str(root / "train-0.tar"), shardshuffle=False)
        .shuffle(BATCH)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform(policy))
        .batched(BATCH)
        .repeat()
    )
    stream = iter(pipeline)
    return lambda: torch.as_tensor(next(stream)[0])


def throughput(quick: bool) -> list[dict[str, object]]:
    cells: list[dict[str, object]] = []
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_data(root, size)
            for policy in (POLICY, ""):
                contenders: dict[str, Contender] = {
                    "ours": ours(root, "train", policy),
                    "ours, folder": ours(root, "folder", policy),
                    "PIL + timm, folder": timm_from_folder(root, policy),
                    "PIL + timm, webdataset": timm_from_webdataset(root, policy),
                }
                times = harness.interleaved(contenders, 3 if quick else 15)
                mode = "RandAugment" if policy else "no policy"
                rates = {who: round(1e3 * BATCH / taken, 1) for who, taken in times.items()}
                best = max(rate for who, rate in rates.items() if "ours" not in who)
                cells.append({
                    "name": name, "dtype": "uint8", "mode": mode, "unit": "images/s",
                    "ours": rates["ours"], "peers": {w: r for w, r in rates.items() if w != "ours"},
                    "speedup": round(rates["ours"] / best, 2),
                })  # fmt: skip
    return cells


def differences(quick: bool) -> dict[str, dict[str, float]]:
    """Compare the pixels of the same draws: differences in levels of 255, and both statistics."""
    found = {}
    for name, size in SIZES.items():
        mine = TrainTransform(
            AugmentConfig(auto_augment="", color_jitter=0), (SIDE, SIDE), "RGB", [0.5] * 3
        )
        theirs = create_transform(
            SIDE, is_training=True, auto_augment=None, color_jitter=0.0, interpolation="bicubic",
            use_prefetcher=True,
        )  # fmt: skip
        pairs = []
        for seed in range(5 if quick else 40):
            data = jpeg(seed, *size)
            pairs.append([_seeded(seed, mine, data), _seeded(seed, theirs, _opened(data))])
        both = np.array(pairs, np.float32)
        distance = np.abs(both[:, 0] - both[:, 1])
        found[name] = {
            "mean difference": round(float(distance.mean()), 3),
            "99th percentile": float(np.percentile(distance, 99)),
            "mean, ours": round(float(both[:, 0].mean()), 2),
            "mean, timm": round(float(both[:, 1].mean()), 2),
            "deviation, ours": round(float(both[:, 0].std()), 2),
            "deviation, timm": round(float(both[:, 1].std()), 2),
        }
    return found


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _seeded(seed: int, run: Callable, image: object) -> np.ndarray:
    with seeded(seed):
        pixels = run(image)
    return np.asarray(pixels.permute(1, 2, 0)) if isinstance(pixels, torch.Tensor) else pixels


def start_of_an_epoch(quick: bool) -> dict[str, float]:
    """Return the seconds until the first batch's indices are known, at 14.2 million samples."""
    size = IMAGENET_22K // (50 if quick else 1)
    runs = np.full(size // 10_000, 10_000)
    runs[-1] += size - runs.sum()
    contenders = {}
    for name, window in (("global", 0), ("window of 100,000", 100_000)):
        sampler = ResumableSampler(
            size, 128, rank=0, world_size=32, seed=0, training=True, runs=runs, window=window
        )

        def first(sampler: ResumableSampler = sampler) -> object:
            sampler.set_position(0, len(sampler) // 2)
            return next(iter(sampler))

        contenders[name] = first
    rng = np.random.default_rng(0)
    contenders["numpy permutation"] = lambda: rng.permutation(size)
    contenders["torch randperm"] = lambda: torch.randperm(size)
    times = harness.interleaved(contenders, 2 if quick else 7, warmup=1)
    return {name: round(taken / 1e3, 3) for name, taken in times.items()}


def main() -> None:
    options = harness.arguments(__doc__ or "").parse_args()
    harness.tuned_process()
    torch.set_num_threads(1)
    cells = throughput(options.quick)
    pixels = differences(options.quick)
    starts = start_of_an_epoch(options.quick)
    peers: list[str] = list(cells[0]["peers"])  # type: ignore[call-overload]
    harness.report(
        "images/s on one core",
        ["JPEG", "policy", "ours, shard", *peers, "over the best peer"],
        [
            [str(c["name"]), str(c["mode"]), str(c["ours"])]
            + [str(c["peers"][who]) for who in peers]  # type: ignore[index]
            + [f"{c['speedup']}x"]
            for c in cells
        ],
    )
    keys = list(next(iter(pixels.values())))
    rows = [[name, *(str(values[key]) for key in keys)] for name, values in pixels.items()]
    harness.report("pixels of the same draws, in levels of 255", ["JPEG", *keys], rows)
    title = f"start of an epoch of {IMAGENET_22K:,} samples, s"
    harness.report(title, list(starts), [[str(taken) for taken in starts.values()]])
    packages = {name: version(name) for name in ("timm", "pillow", "webdataset", "simplejpeg")}
    harness.write_json(options.json, cells, packages=packages, pixels=pixels, epoch_start_s=starts)


if __name__ == "__main__":
    main()
