"""``swin-moe prepare-data`` and ``swin-moe data verify``."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ...common.terminal import print_line
from ...common.text import plain
from ..classes import match, quoted
from ..decode import MAX_PIXELS
from ..files import Source
from ..names import finder, read_classes
from ..readers.shards import ShardSource
from ..source import open_splits
from .prepare import Settings, finish, names_or_numbers, prepare
from .verify import verify


def prepare_data(
    path: Path,
    output: Path,
    console: Console,
    *,
    val_share: float = 0.0,
    shard_megabytes: int = 512,
    resize: int = 0,
    classes: Path | None = None,
    seed: int = 0,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write tar shards with an index from any data set that can be read.

    Args:
        path: of the data set, see :func:`.source.open_splits`.
        output: folder of the shards.
        console: for progress and results.
        val_share: of each class, the samples that go to ``val``.
        shard_megabytes: size of a shard.
        resize: shorter side in pixels to which larger images are resized; 0 = none.
        classes: a file with the classes to keep, one per line; None = all.
        seed: of the order of samples.
        workers: processes; 0 = one per core.
        max_pixels: of an image; a larger one is not decoded.

    Raises:
        ValueError: wrong options or data; one line naming the option, the file or the folder.
    """
    _check_numbers(val_share, shard_megabytes, resize, max_pixels)
    if resize:
        from .. import transforms  # noqa: F401 - imports torch once for all forked processes
    sources = _open(path, console, val_share, max_pixels)
    kept = None if classes is None else _kept_classes(classes)
    _report_absent(kept or [], sources["train"], console)
    for split, source in sources.items():
        _describe(split, source, console)
        settings = Settings(
            source=plain(path.resolve()),
            seed=seed,
            shard_bytes=shard_megabytes * 1_000_000,
            resize=resize,
            val_share=val_share if split == "train" else 0.0,
        )
        workers = workers or len(os.sched_getaffinity(0))
        skipped = prepare(
            source, output, settings, console, split=split, classes=kept, workers=workers
        )
        if skipped:
            bad = plain(output / f"bad-samples-{split}.jsonl")
            print_line(console, f"{len(skipped):,} samples cannot be read and are left out: {bad}")
    finish(output)
    for split, source in open_splits(output).items():
        _describe(split, source, console)
    print_line(console, f"train on it with data.path={plain(output)}")


def _check_numbers(val_share: float, shard_megabytes: int, resize: int, max_pixels: int) -> None:
    if not 0 <= val_share < 1:
        raise ValueError(f"--val={val_share}: give a share in [0, 1)")
    if shard_megabytes < 1:
        raise ValueError(f"--shard-size={shard_megabytes}: give megabytes")
    if resize < 0:
        raise ValueError(f"--resize={resize}: give pixels")
    _check_max_pixels(max_pixels)


def _check_max_pixels(max_pixels: int) -> None:
    if max_pixels < 1:
        raise ValueError(f"--max-pixels={max_pixels}: give a number above 0")


def _open(path: Path, console: Console, val_share: float, max_pixels: int) -> dict[str, Source]:
    with console.status(Text(f"looking at {plain(path)}")):
        sources = open_splits(path)
    for source in sources.values():
        source.max_pixels = max_pixels
    _check_splits(path, sources, val_share)
    return sources


def _check_splits(path: Path, sources: dict[str, Source], val_share: float) -> None:
    if "val" not in sources:
        return
    if val_share:
        raise ValueError(f"--val={val_share}: {plain(path)} has a validation split of its own")
    known, held_out = sources["train"].class_names, sources["val"].class_names
    if held_out == known:
        return
    if known and held_out and all(finder(known)(name) >= 0 for name in held_out):
        sources["val"] = match(sources["val"], known, plain(path))  # some classes have no sample
    else:
        raise ValueError(
            f"{plain(path)}: the validation split has other classes than the training split: "
            "labels would shift, so give both the same class folders (one may be empty)"
        )


def _report_absent(kept: list[str], source: Source, console: Console) -> None:
    """Print the listed classes that the data lacks; they may be misspelt."""
    place = finder(names_or_numbers(source))
    if absent := [name for name in kept if place(name) < 0]:
        print_line(
            console,
            f"not in the data, {len(absent):,} of {len(kept):,} of --classes: {quoted(absent)}",
        )


def _kept_classes(path: Path) -> list[str]:
    """Read the class names in a file, one per line, in the order of their labels."""
    kept = [line.strip() for line in "\n".join(read_classes(path)).strip().split("\n")]
    if "" in kept:
        raise ValueError(f"{plain(path)}: line {kept.index('') + 1} is empty: labels are lines")
    return kept


def verify_data(
    path: Path, console: Console, output: Path, workers: int = 0, max_pixels: int = MAX_PIXELS
) -> bool:
    """Read and decode every sample of all splits at ``path``; return whether all are well.

    Raises:
        ValueError: there is nothing that can be read; one line.
    """
    _check_max_pixels(max_pixels)
    well, sources = True, open_splits(path)
    if not any(map(len, sources.values())):
        others = sources["train"].passed_over
        raise ValueError(f"{plain(path)} holds no images" + f" ({others})" * bool(others))
    for split, source in sources.items():
        source.max_pixels = max_pixels
        _describe(split, source, console)
        listed = output.with_name(f"{output.stem}-{split}{output.suffix}")
        well &= verify(
            source,
            source.manifest if isinstance(source, ShardSource) else None,
            listed,
            console,
            workers or len(os.sched_getaffinity(0)),
        )
    return well


def _describe(split: str, source: Source, console: Console) -> None:
    classes = int((source.class_counts > 0).sum())
    empty = len(source.class_names or source.class_counts) - classes
    more = f" ({empty:,} more have none)" if empty else ""
    passed = f"; {source.passed_over}" if source.passed_over else ""
    print_line(
        console,
        f"{split}: {len(source):,} samples of {classes:,} classes{more}, "
        f"{plain(source.describe() + passed)}",
    )
