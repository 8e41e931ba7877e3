"""Writing a checkpoint again with another number of files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .folder import (
    CheckpointError,
    file_digest,
    rank_file,
    read_manifest,
    sync,
    verify,
    write_manifest,
)
from .fragments import Entry, Span, key, to_json
from .reader import Reader


def reshard(source: Path, target: Path, files: int) -> None:
    """Write a checkpoint again as ``files`` files of about equal size; memory holds one at a time.

    Every tensor is cut into ``files`` spans. The generators of further ranks are left out.

    Raises:
        CheckpointError: ``source`` is damaged, or ``target`` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists: choose another name")
    verify(source)  # otherwise damage would get a valid digest
    reader, manifest = Reader(source), read_manifest(source)
    entries = {n: Entry(e.shape, 1, e.kinds) for n, e in reader.entries.items()}
    partial = target.with_name(f"partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digests: dict[str, Any] = {}
    try:
        for index in range(files):
            file = partial / rank_file(index)
            save_file(_part(reader, entries, index, files), file)
            file.chmod(partial.stat().st_mode & 0o666)
            sync(file)
            digests[file.name] = file_digest(file)
        for name in manifest.files:
            if not name.endswith(".safetensors"):
                shutil.copyfile(source / name, partial / name)
                digests[name] = file_digest(partial / name)
        write_manifest(partial, digests, to_json(entries))
        sync(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _part(
    reader: Reader, entries: dict[str, Entry], index: int, files: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of one file, and add their spans to the entries."""
    tensors = reader.rng_states(index)
    for name, entry in entries.items():
        total = math.prod(entry.shape)
        length = -(-total // files)
        start, stop = min(index * length, total), min((index + 1) * length, total)
        if start == stop:
            continue
        entry.spans.append(Span(index, 0, start, stop))
        for kind in entry.kinds:
            tensors[key(name, kind)] = reader.values(name, kind, None, start, stop)
    return tensors
