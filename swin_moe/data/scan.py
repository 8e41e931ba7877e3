"""Read the headers of a tar shard: which samples it holds, and where."""

from __future__ import annotations

import gzip
import io
import itertools
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from .index import MAX_CLASSES, RECORD

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
LOOKED_AT = 20  # members of a tar, to tell what it is
MAX_UNPACKED = 1 << 30  # bytes of one .gz shard

_REMEDY = "mend the shard, or write the set anew with `swin-moe prepare-data`"


def base_plus_ext(path: str) -> tuple[str | None, str | None]:
    """A member's key and extensions, cut at the first dot of its name, as webdataset cuts it.

    webdataset's own function would import torch. Returns (None, None) for a name without a dot,
    or with one in front.
    """
    match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", path)
    return (match[1], match[2]) if match else (None, None)


@dataclass
class Scan:
    """The samples of one shard; ``content`` is the unpacked archive, if it was compressed."""

    table: np.ndarray
    content: bytes | None


def scan_shard(path: Path, number: int, label: int | None = None) -> Scan:
    """Index a shard.

    Args:
        number: what the table is to call it.
        label: of all its images, in a tar per class; None = each has a ``.cls`` beside it.

    Raises:
        ValueError: one line naming the shard, if it is truncated or damaged, a key comes twice, a
            sample lacks its image or label, or a label is no number.
    """
    content = None
    try:
        if is_compressed(path):
            with gzip.open(path) as packed:
                content = packed.read(MAX_UNPACKED + 1)
            if len(content) > MAX_UNPACKED:
                raise tarfile.ReadError(f"more than {MAX_UNPACKED >> 20} MiB when unpacked")
            stream: IO[bytes] = io.BytesIO(content)
        else:
            stream = path.open("rb")
        with stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            scanner = _Scanner(path, tar, label)
            for member in _members(tar):
                scanner.add(member)
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # tarfile takes this for a quiet end; it is a lost tail or a damaged header.
                raise tarfile.ReadError("no end-of-archive block")
            scanner.finish()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(
            f"{path}: the shard is truncated or damaged ({error}): copy or write it again"
        ) from None
    return Scan(scanner.table(number), content)


def is_compressed(path: Path) -> bool:
    return path.name.endswith("gz")


def has_labels(path: Path) -> bool:
    """Whether a tar's samples have a ``.cls``; else it may be a tar of one class.

    Raises:
        ValueError: the tar cannot be read.
    """
    try:
        with tarfile.open(path) as tar:
            first = itertools.islice(_members(tar), LOOKED_AT)
            suffixes = {member.name.rpartition(".")[2].lower() for member in first}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path}: not a tar file, or a damaged one ({error})") from None
    return "cls" in suffixes or not suffixes & IMAGE_EXTENSIONS


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Files in their order, without the list of all of them that tarfile keeps."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isfile():
            yield member


def sample_key(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and lower-case extension, as webdataset takes a name apart."""
    key, extension = base_plus_ext(member.name)
    return key or member.name, (extension or "").lower()


@dataclass
class _Scanner:
    """Gathers neighbouring members of one key, as webdataset does; ignores other extensions."""

    path: Path
    tar: tarfile.TarFile
    class_label: int | None
    key: str | None = None
    image: tarfile.TarInfo | None = None
    label: int | None = None
    other_images: int = 0  # fields of samples, or images whose names have dots
    seen: set[str] = field(default_factory=set)
    # Typed: a million tuples would be 100 MB.
    fields: tuple[array, ...] = field(default_factory=lambda: tuple(array("q") for _ in range(4)))

    def add(self, member: tarfile.TarInfo) -> None:
        key, extension = sample_key(member)
        if self.class_label is not None:  # plain files, whose names may have dots and doubles
            key, extension = member.name, member.name.rpartition(".")[2].lower()
            if extension == "cls":
                raise ValueError(
                    f"{self.path}: it has labels (.cls), but others beside it do not: {_REMEDY}"
                )
        if extension != "cls" and extension not in IMAGE_EXTENSIONS:
            self.other_images += extension.rpartition(".")[2] in IMAGE_EXTENSIONS
            return
        if key != self.key:
            self.finish()
            if key in self.seen:
                raise ValueError(f"{self.path}: the key '{key}' comes twice: {_REMEDY}")
            self.seen.add(key)
            self.key, self.image, self.label = key, None, self.class_label
        if extension != "cls":
            if self.image is not None:
                raise ValueError(f"{self.path}: the key '{key}' has two images: {_REMEDY}")
            self.image = member
        else:
            content = self.tar.extractfile(member)
            assert content is not None  # it is a file
            self.label = self._parse(content.read())

    def finish(self) -> None:
        """The samples of the current key are complete."""
        if self.key is None:
            return
        if self.image is None or self.label is None:
            lack = "label (.cls)" if self.label is None else "image (.jpg, .png, .webp, …)"
            raise ValueError(f"{self.path}: sample '{self.key}' has no {lack}: {_REMEDY}")
        image = self.image
        values = self.label, image.offset_data, image.size, image.offset_data - image.offset
        for column, value in zip(self.fields, values, strict=True):
            column.append(value)

    def table(self, number: int) -> np.ndarray:
        if self.other_images and not len(self.fields[0]):
            raise ValueError(
                f"{self.path}: {self.other_images} images, but none with a .cls of its key, which "
                f"ends at the first dot: {_REMEDY}"
            )
        table = np.empty(len(self.fields[0]), RECORD)
        table["shard"] = number
        for name, column in zip(("label", "offset", "size", "header"), self.fields, strict=True):
            table[name] = column
        return table

    def _parse(self, text: bytes) -> int:
        try:
            label = int(text)
        except ValueError:
            label = -1
        if not 0 <= label < MAX_CLASSES:
            raise ValueError(
                f"{self.path}: the label of sample '{self.key}' is {text[:20]!r}, not a class "
                f"number from 0 on: {_REMEDY}"
            )
        return label
