"""``swin-moe prepare-data``: any data set to shuffled tar shards with an index.

The plan is written first. Each shard is a pure function of the plan, written under a temporary name
and then renamed. Processes may write shards in any order, a kill loses only unfinished shards, and
the same command goes on from there.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from rich.console import Console
from rich.filesize import decimal

from ...common.reading import sha256
from ...common.terminal import print_line
from ...common.text import plain
from ...common.writing import replacing
from ..bad_samples import Skipped, json_lines
from ..decode import EncodedImage, UnreadableImage
from ..files import Source
from ..names import finder, write_classes
from ..readers.index import DatasetManifest, Shard, write_index
from ..readers.scan import scan_shard
from ..rng import permutation
from .parallel import in_processes
from .progress import sample_progress

QUALITY = 95  # of a resized JPEG
PROBED = 200  # images whose mean size decides how many fill a shard
WORK = ".prepare"  # folder of the plan and of the records of finished shards


@dataclass(frozen=True)
class Settings:
    """The settings that decide the bytes of a split's shards, see :func:`.prepare_data`."""

    source: str  # path of the data set
    seed: int
    shard_bytes: int
    resize: int
    val_share: float


class _Shard(NamedTuple):
    """A split to write; forked processes inherit it without a copy."""

    source: Source
    labels: np.ndarray  # [N] as written
    order: np.ndarray  # places in the source
    samples: int  # of a shard
    prefix: Path
    resize: int

    def members(self, shard: int) -> np.ndarray:
        return self.order[shard * self.samples : (shard + 1) * self.samples]

    @property
    def num_shards(self) -> int:
        return -(-len(self.order) // self.samples)

    def path(self, shard: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}-{shard:06d}.tar")

    def record(self, shard: int) -> Path:
        """Return the path of the record of a complete shard."""
        return self.prefix.parent / WORK / f"{self.path(shard).name}.json"


_JOB: list[_Shard] = []  # inherited by forked processes


def prepare(
    source: Source,
    output: Path,
    settings: Settings,
    console: Console,
    *,
    split: str = "train",
    classes: list[str] | None = None,
    workers: int = 1,
) -> list[Skipped]:
    """Write ``split-*.tar`` (and ``val-*.tar``), ``split.json`` with the index, ``classes.txt``.

    Args:
        classes: the classes to keep, by name (or number, if the source has no names), in the order
            of their new labels; None = all.

    Returns:
        the samples that could not be read; they are left out and listed in
        ``bad-samples-SPLIT.jsonl``.

    Raises:
        ValueError: there is nothing to write, the folder holds other data, or the disk is too
            small; one line.
    """
    labels, names = _relabel(source, classes)
    parts = _split(labels, settings, split)
    work = output / WORK
    kinds = ("{}.json", "{}-*.tar")
    if not work.exists() and any(
        True for name in parts for kind in kinds for _ in output.glob(kind.format(name))
    ):
        raise ValueError(f"{output} holds shards already: remove it or choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    plan = {**asdict(settings), "split": split, "samples": len(source), "classes": names}
    samples = _plan(work / f"{split}.json", plan, source, parts, settings, output)
    skipped: list[Skipped] = []
    for name, order in parts.items():
        job = _Shard(source, labels, order, samples, output / name, settings.resize)
        skipped += _write_split(job, settings, console, workers)
    if names is not None:
        write_classes(output / "classes.txt", names)
    if skipped:
        (output / f"bad-samples-{split}.jsonl").write_text(json_lines(skipped), encoding="utf-8")
    return skipped


def finish(output: Path) -> None:
    """Remove the records of a preparation whose splits are all written."""
    shutil.rmtree(output / WORK, ignore_errors=True)


def _relabel(source: Source, classes: list[str] | None) -> tuple[np.ndarray, list[str] | None]:
    """Return the labels [N] to write, −1 for samples to leave out, and the class names."""
    if classes is None:
        return np.asarray(source.labels), source.class_names
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"the class '{twice}' is listed twice")
    known = names_or_numbers(source)
    table = np.array(list(map(finder(classes), known)), np.int32)
    if (table < 0).all():
        raise ValueError(
            f"none of the {len(classes):,} listed classes is in the data, first listed "
            f"'{classes[0]}', first in the data '{known[0]}'"
        )
    return table[source.labels], classes


def names_or_numbers(source: Source) -> list[str]:
    """Return the names of a source's classes for ``--classes``."""
    return source.class_names or [str(number) for number in range(len(source.class_counts))]


def _split(labels: np.ndarray, settings: Settings, split: str) -> dict[str, np.ndarray]:
    """Return each split's samples, shuffled: the first of each class go to ``val``."""
    order = permutation(len(labels), settings.seed)
    order = order[labels[order] >= 0]
    if not settings.val_share:
        return {split: order}
    chosen = labels[order]
    by_class = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen)
    rank = np.empty(len(order), np.int64)
    rank[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    held_out = rank < np.round(settings.val_share * counts)[chosen]
    if len(order) and (held_out.all() or not held_out.any()):
        what, how = ("all", "smaller") if held_out.all() else ("none", "larger")
        raise ValueError(
            f"--val={settings.val_share}: it would hold out {what} of {len(order):,} samples, as a "
            f"share of each class: give a {how} share"
        )
    return {split: order[~held_out], "val": order[held_out]}


def _plan(
    path: Path,
    plan: dict,
    source: Source,
    parts: dict[str, np.ndarray],
    settings: Settings,
    output: Path,
) -> int:
    """Return the samples per shard: from a former start's plan, or by the size of some images."""
    if path.exists():
        former = json.loads(path.read_text(encoding="utf-8"))
        samples = former.pop("samples_per_shard")
        if former != plan:
            key = next(key for key in plan if plan[key] != former.get(key))
            values = "" if key == "classes" else f" ({former.get(key)!r}, now {plan[key]!r})"
            raise ValueError(
                f"{output} holds an unfinished preparation with another '{key}'{values}: finish "
                "that, or choose another folder"
            )
        return samples
    count = sum(len(order) for order in parts.values())
    if not count:
        raise ValueError("there is no sample to write")
    order = next(order for order in parts.values() if len(order))
    sizes = []
    for index in order[:PROBED]:
        try:
            sizes.append(
                len(_encoded(source.read(int(index)), settings.resize, source.max_pixels)[0]) + 2048
            )
        except (OSError, ValueError):
            continue
    if not sizes:
        raise ValueError(f"none of {PROBED} samples can be read, first {source.key(int(order[0]))}")
    needed, free = int(np.mean(sizes) * count), shutil.disk_usage(output).free
    if needed > free:
        raise ValueError(
            f"{output}: the shards need about {decimal(needed)}, and the disk has {decimal(free)}"
        )
    samples = max(1, round(settings.shard_bytes / float(np.mean(sizes))))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**plan, "samples_per_shard": samples}), encoding="utf-8")
    return samples


def _write_split(job: _Shard, settings: Settings, console: Console, workers: int) -> list[Skipped]:
    done = [shard for shard in range(job.num_shards) if _is_done(job, shard)]
    rest = sorted(set(range(job.num_shards)) - set(done))
    if done:
        print_line(
            console, f"{plain(job.prefix.name)}: {len(done)} of {job.num_shards} shards are written"
        )
    _JOB[:] = [job]
    with sample_progress(console, job.prefix.name, len(job.order)) as advance:
        advance(sum(len(job.members(shard)) for shard in done), 0)
        with closing(in_processes(_write_shard, rest, workers)) as written:
            for shard, size in written:
                advance(len(job.members(shard)), size)
    _JOB.clear()
    return _index(job, settings)


def _is_done(job: _Shard, shard: int) -> bool:
    try:
        state = json.loads(job.record(shard).read_text(encoding="utf-8"))
        return job.path(shard).stat().st_size == state["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def _write_shard(shard: int) -> tuple[int, int]:
    (job,) = _JOB
    path = job.path(shard)
    skipped: list[Skipped] = []
    with replacing(path, path.parent / WORK) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for index in job.members(shard).tolist():
                try:
                    encoded = job.source.read(index)
                    data, extension = _encoded(encoded, job.resize, job.source.max_pixels)
                # Another OSError ends the run, since the disk may be at fault; it may go on later.
                except (FileNotFoundError, ValueError) as error:
                    if isinstance(error, FileNotFoundError) and not _is_missing(error, job, index):
                        raise
                    skipped.append(Skipped.of(job.source.key(index), error))
                    continue
                key = _key(job.source, index)
                _add(tar, f"{key}.{extension}", data)
                _add(tar, f"{key}.cls", str(job.labels[index]).encode())
        table = scan_shard(temporary, shard).table
        size, digest = temporary.stat().st_size, sha256(temporary)
    work = job.record(shard)
    np.save(work.with_suffix(".npy"), table, allow_pickle=False)
    state = {
        "samples": len(table),
        "bytes": size,
        "sha256": digest,
        "skipped": [sample._asdict() for sample in skipped],
    }
    with replacing(work) as temporary:
        temporary.write_text(json.dumps(state), encoding="utf-8")
    return shard, size


def _is_missing(error: FileNotFoundError, job: _Shard, index: int) -> bool:
    """Return whether only this image is missing; otherwise a disk may be gone."""
    key = job.source.key(index)
    return error.filename == key and Path(key).parent.is_dir()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time or owner: the same plan gives the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _key(source: Source, index: int) -> str:
    """Return a unique key with the place in the source and the image's name there."""
    stem = source.key(index).replace("\\", "/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    stem = stem.rsplit(".", 1)[0] if "." in stem else stem
    return f"{index:09d}-{plain(stem).replace('.', '_')}"


def _encoded(data: bytes, shorter_side: int, max_pixels: int) -> tuple[bytes, str]:
    """Return an image as it is stored, and its extension.

    Raises:
        UnreadableImage: it is no image, or it cannot be decoded for resizing.
    """
    extension = image_extension(data)
    if extension is None:
        raise UnreadableImage(
            "not an image", "neither JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF nor PPM"
        )
    if shorter_side:
        image = EncodedImage(data, "RGB", max_pixels)
        height, width = image.height, image.width
        if min(height, width) > shorter_side:
            scale = shorter_side / min(height, width)
            sides = round(height * scale), round(width * scale)
            from ..transforms import resize  # imports torch

            pixels = resize(image.pixels(), sides, "bicubic")
            data = simplejpeg.encode_jpeg(pixels, QUALITY, colorsubsampling="420")
            extension = "jpg"
    return data, extension


def image_extension(data: bytes) -> str | None:
    """Return an image file's extension by its first bytes."""
    for start, extension in (
        (b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n", "png"), (b"GIF8", "gif"), (b"BM", "bmp"),
        (b"II*\0", "tif"), (b"MM\0*", "tif"), (b"II+\0", "tif"), (b"MM\0+", "tif"),
    ):  # fmt: skip
        if data.startswith(start):
            return extension
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "ppm"
    if data[4:8] == b"ftyp" and any(b in data[8:64] for b in (b"avif", b"avis")):
        return "avif"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _index(job: _Shard, settings: Settings) -> list[Skipped]:
    """Write the manifest and the joined table; return the samples left out."""
    shards, skipped, counts = [], [], np.zeros(int(job.labels.max()) + 1, np.int64)
    for shard in range(job.num_shards):
        state = json.loads(job.record(shard).read_text(encoding="utf-8"))
        skipped += [Skipped(**sample) for sample in state.pop("skipped")]
        shards.append(Shard(name=job.path(shard).name, **state))
        counts += np.bincount(_table(job, shard)["label"], minlength=len(counts))
    if len(job.order) and not counts.any():
        raise ValueError(f"no sample of {job.prefix.name} can be read, first {skipped[0].key}")
    manifest = DatasetManifest(
        shards=shards, class_counts=counts.tolist(), preparation=asdict(settings)
    )
    tables = (_table(job, shard) for shard in range(job.num_shards))
    write_index(job.prefix.with_name(f"{job.prefix.name}.json"), manifest, tables)
    return skipped


def _table(job: _Shard, shard: int) -> np.ndarray:
    return np.load(job.record(shard).with_suffix(".npy"), allow_pickle=False)
