"""``swin-moe data verify``: read and decode every sample, and list the bad ones."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

from rich.console import Console

from ...common.reading import sha256
from ...common.terminal import print_line
from ...common.text import plain
from ..bad_samples import Skipped, json_lines
from ..decode import EncodedImage
from ..files import Source
from ..readers.index import DatasetManifest, read_index
from .parallel import in_processes
from .progress import sample_progress

PART = 500  # samples that a process takes at once

_SOURCE: list[Source] = []  # inherited by forked processes


def verify(
    source: Source, manifest: Path | None, output: Path, console: Console, workers: int
) -> bool:
    """Decode every sample, and compare every shard's digest with its manifest.

    Return whether all samples can be read and no shard has changed.

    Args:
        output: the list of bad samples, one JSON object per line; written if there are any.
    """
    skipped: list[Skipped] = []
    parts = [range(i, min(i + PART, len(source))) for i in range(0, len(source), PART)]
    _SOURCE[:] = [source]
    with (
        sample_progress(console, "decoding", len(source)) as advance,
        closing(in_processes(_decode, parts, workers)) as decoded,
    ):
        for count, size, bad in decoded:
            advance(count, size)
            skipped += bad
    _SOURCE.clear()
    changed = _changed_shards(manifest, console, workers) if manifest else []
    if skipped:
        output.write_text(json_lines(skipped), encoding="utf-8")
    _print_report(len(source), skipped, changed, output, console)
    return not skipped and not changed


def _decode(part: range) -> tuple[int, int, list[Skipped]]:
    (source,) = _SOURCE
    size, bad = 0, []
    for index in part:
        try:
            data = source.read(index)
            size += len(data)
            EncodedImage(data, "RGB", source.max_pixels).pixels()
        except (OSError, ValueError) as error:
            bad.append(Skipped.of(source.key(index), error))
    return len(part), size, bad


def _changed_shards(path: Path, console: Console, workers: int) -> list[str]:
    manifest: DatasetManifest = read_index(path)[0]
    expected = {path.parent / s.name: s for s in manifest.shards if s.sha256}
    changed = []
    with (
        sample_progress(console, "digests", len(expected)) as advance,
        closing(in_processes(_digest, list(expected), workers)) as digests,
    ):
        for file, digest in digests:
            advance(1, expected[file].bytes)
            if digest != expected[file].sha256:
                changed.append(str(file))
    return sorted(changed)


def _digest(path: Path) -> tuple[Path, str]:
    return path, sha256(path)


def _print_report(
    count: int, skipped: list[Skipped], changed: list[str], output: Path, console: Console
) -> None:
    for name in changed:
        print_line(console, f"{plain(name)}: its content is not what was written: copy it again")
    for kind, number in Counter(sample.kind for sample in skipped).most_common():
        first = next(sample for sample in skipped if sample.kind == kind)
        print_line(console, f"{number:,} {kind}, first {plain(first.key)} ({plain(first.reason)})")
    found = (
        f"{len(skipped):,} bad ones are listed in {plain(output)}" if skipped else "all can be read"
    )
    print_line(console, f"{count:,} samples: {found}")
