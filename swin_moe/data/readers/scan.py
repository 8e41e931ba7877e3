"""Scanning the headers of a tar shard for its samples and their offsets."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from ...common.text import plain
from ..which import SUFFIXES, among_companions, suffix, walk_order
from .index import MAX_CLASSES, RECORD

KNOWN = SUFFIXES | {"cls"}
LOOKED_AT = 20  # members of a tar that decide its kind
LABEL_BYTES = 64  # read of a .cls
JSON_BYTES = 1 << 16  # read of a .json in search of a number
MAX_SIZE = 0xFFFFFFFF  # bytes of an image in the table
ZEROS_READ = 1 << 20  # bytes read at once after the end of a tar
MAX_UNPACKED = 1 << 30  # bytes of one .gz shard

_REMEDY = "mend the shard, or write the set again with `swin-moe prepare-data`"


def base_plus_ext(path: str) -> tuple[str | None, str | None]:
    """Return a member's key and extensions, cut at its name's first dot as in webdataset.

    webdataset's own function would import torch. A name without a dot, or with one in front, gives
    (None, None).
    """
    match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", path)
    return (match[1], match[2]) if match else (None, None)


@dataclass
class Scan:
    """The samples of one shard.

    Attributes:
        table: ``RECORD`` [N].
        content: the unpacked archive, if it was compressed.
        passed_over: number of images without a label of their key; in a tar per class, number of
            files that are not named like images.
    """

    table: np.ndarray
    content: bytes | None
    passed_over: int = 0


def scan_shard(path: Path, number: int, label: int | None = None) -> Scan:
    """Index a shard.

    Args:
        number: of the shard in the table.
        label: of all its images, in a tar per class; None = each has its own ``.cls``.

    Raises:
        ValueError: the shard is truncated or damaged, a key comes twice, a sample lacks its image
            or label, or a label is no number; one line naming the shard.
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
                if not member.isfile():
                    raise _link(path, member)
                scanner.add(member)
            _check_end(path, stream, tar.offset)
            scanner.finish()
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(
            f"{plain(path)}: the shard is truncated or damaged ({error}): copy or write it again"
        ) from None
    return Scan(scanner.table(number), content, scanner.passed_over)


def _check_end(path: Path, stream: IO[bytes], start: int) -> None:
    """Raise an error unless the tar ends where tarfile stops, with nothing after it."""
    stream.seek(start)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        # The tail is lost or a header damaged; tarfile ends here without an error.
        raise tarfile.ReadError("no end-of-archive block")
    while rest := stream.read(ZEROS_READ):
        if rest.count(0) < len(rest):
            raise ValueError(
                f"{plain(path)}: more follows after the end of the tar, as if tars were joined by "
                "cat: keep them apart, or join them with `tar --concatenate`"
            )


def is_compressed(path: Path) -> bool:
    return path.name.endswith("gz")


def have_labels(paths: Sequence[Path]) -> bool:
    """Return whether the samples of tars have a ``.cls``; otherwise each tar is one class.

    The first tar with samples decides, since a class may be empty.

    Raises:
        ValueError: see :func:`has_labels`.
    """
    answers = (has_labels(path) for path in paths)
    return next((answer for answer in answers if answer is not None), True)


def has_labels(path: Path) -> bool | None:
    """Return whether a tar's samples have a ``.cls``; None without images and labels.

    Raises:
        ValueError: the tar cannot be read; or its images have other files of their key, such as the
            texts of img2dataset, and no label.
    """
    try:
        with tarfile.open(path) as tar:
            found = list(itertools.islice(_members(tar), LOOKED_AT))
            names = [member.name for member in found]
            number = next((n for member in found if (n := _number_in(tar, member))), "")
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{plain(path)}: not a tar file, or a damaged one ({error})") from None
    kinds = {suffix(name) for name in names}
    if "cls" in kinds:
        return True
    if not kinds & SUFFIXES:
        return None
    images = {name.rpartition(".")[0] for name in names if suffix(name) in SUFFIXES}
    others = {suffix(n) for n in names if n.rpartition(".")[0] in images} - SUFFIXES
    if others:
        raise ValueError(
            f"{plain(path)}: its images have .{' and .'.join(sorted(others))} next to them, but no "
            f"label: put a class number from 0 on into a .cls for each image{number}"
        )
    return False


def _number_in(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Return a hint on a label that a ``.json`` may hold."""
    content = tar.extractfile(member) if suffix(member.name) == "json" else None
    if content is None:
        return ""
    try:
        values = json.loads(content.read(JSON_BYTES))
    except (ValueError, RecursionError):
        return ""
    for name in ("label", "cls", "class", "class_id", "target"):
        if isinstance(values, dict) and type(values.get(name)) is int:
            return f' (its .json has "{name}": {str(values[name])[:20]}, which may be that number)'
    return ""


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield files, and links named like images or labels; do not keep tarfile's list of all."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        linked = (member.islnk() or member.issym()) and suffix(member.name) in KNOWN
        if (member.isfile() or linked) and not among_companions(member.name):
            yield member


def _link(path: Path, member: tarfile.TarInfo) -> ValueError:
    return ValueError(
        f"{plain(path)}: '{plain(member.name)}' is a link to '{plain(member.linkname)}', and links "
        "in tars are not followed: write the tar again with `tar --dereference --hard-dereference`"
    )


def sample_key(member: tarfile.TarInfo) -> tuple[str, str]:
    """Return key and lower-case extension, as webdataset splits a name.

    A name with more dots that ends like an image or a label (``v1.3_a.jpg``) is split at the last
    one: its key has dots.
    """
    key, extension = base_plus_ext(member.name)
    extension = (extension or "").lower()
    if key is None or (extension not in KNOWN and suffix(member.name) in KNOWN):
        return member.name.rpartition(".")[0] or member.name, suffix(member.name)
    return key, extension


@dataclass
class _Group:
    """Members of one key: an image and its label."""

    key: str
    image: tarfile.TarInfo | None = None
    label: int | None = None


@dataclass
class _Scanner:
    """A scan that joins neighbouring members of one key, as webdataset does.

    Names with more dots are joined apart from the others, since ``a.mask.png`` may lie between
    ``a.jpg`` and ``a.cls``. Among them, an image without a label is passed over.
    """

    path: Path
    tar: tarfile.TarFile
    class_label: int | None
    passed_over: int = 0
    seen: set[str] = field(default_factory=set)
    group: _Group | None = None
    dotted: _Group | None = None
    names: list[str] = field(default_factory=list)  # of the images in a tar per class
    # A million tuples would take 100 MB.
    fields: tuple[array, ...] = field(default_factory=lambda: tuple(array("q") for _ in range(4)))

    def add(self, member: tarfile.TarInfo) -> None:
        key, extension = sample_key(member)
        if self.class_label is not None:  # plain files, whose names may have dots and repeat
            key, extension = member.name, suffix(member.name)
            if extension == "cls":
                raise self._wrong("it has labels (.cls), but other tars of the set have none")
        if extension not in KNOWN:
            if self.class_label is not None:
                self._check_alone(member)
                self.passed_over += 1
            return
        dotted = self.class_label is None and base_plus_ext(member.name)[0] != key
        group = self.dotted if dotted else self.group
        if group is None or group.key != key:
            self._finish(group, dotted)
            if key in self.seen:
                raise self._wrong(f"the key '{plain(key)}' comes twice")
            self.seen.add(key)
            group = _Group(key, None, self.class_label)
            if dotted:
                self.dotted = group
            else:
                self.group = group
        if extension != "cls":
            if group.image is not None:
                raise self._wrong(f"the key '{plain(key)}' has two images")
            group.image = member
        else:
            content = self.tar.extractfile(member)
            assert content is not None  # it is a file
            group.label = self._parse(key, content.read(LABEL_BYTES))

    def _check_alone(self, member: tarfile.TarInfo) -> None:
        """Raise an error if an image in a tar per class has a text or JSON of its own."""
        if self.group is None:
            return
        if self.group.key.rpartition(".")[0] == member.name.rpartition(".")[0]:
            raise self._wrong(
                f"'{plain(self.group.key)}' has '{plain(member.name)}' next to it and no label "
                f"(.cls){_number_in(self.tar, member)}"
            )

    def finish(self) -> None:
        """End the last samples."""
        self._finish(self.group, dotted=False)
        self._finish(self.dotted, dotted=True)

    def _finish(self, group: _Group | None, dotted: bool) -> None:
        """Check a key's members and add them to the table."""
        if group is None:
            return
        if dotted and group.label is None:
            self.passed_over += 1
            return
        if group.image is None or group.label is None:
            lack = "label (.cls)" if group.label is None else "image (.jpg, .png, .webp, …)"
            raise self._wrong(f"sample '{plain(group.key)}' has no {lack}")
        image = group.image
        size, header = min(image.size, MAX_SIZE), image.offset_data - image.offset
        values = group.label, image.offset_data, size, header
        if self.class_label is not None:
            self.names.append(group.key)
        for column, value in zip(self.fields, values, strict=True):
            column.append(value)

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{plain(self.path)}: {what}: {_REMEDY}")

    def table(self, number: int) -> np.ndarray:
        if self.passed_over and not len(self.fields[0]) and self.class_label is None:
            raise self._wrong(f"{self.passed_over} images, but none with a .cls of its key")
        table = np.empty(len(self.fields[0]), RECORD)
        table["shard"] = number
        for name, column in zip(("label", "offset", "size", "header"), self.fields, strict=True):
            table[name] = column
        if self.names:  # the order of the same files in a folder
            table = table[sorted(range(len(table)), key=lambda i: walk_order(self.names[i]))]
        return table

    def _parse(self, key: str, text: bytes) -> int:
        digits = text.strip()
        label = int(digits) if digits.isdigit() else -1
        if not 0 <= label < MAX_CLASSES:
            raise self._wrong(
                f"the label of sample '{plain(key)}' is {text[:20]!r}, not a class number from 0 on"
            )
        return label
