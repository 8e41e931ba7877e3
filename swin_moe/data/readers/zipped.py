"""Images in a zip archive with class folders, or with the list of labels of the official Swin."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.filesize import decimal

from ...common.text import plain
from ..files import Bounded
from ..names import Names
from ..which import PassedOver, among_companions, is_image
from .file_list import read_list

STORED, DEFLATED = 0, 8
DOS = 0  # the number of the system that made an entry
DIRECTORY = struct.Struct("<4s6H3L5H2L")  # an entry of the central directory, without its name
LOCAL = struct.Struct("<4s5H3L2H")  # header before an entry's data
CHUNK = 4 << 20  # bytes of the directory that are read at once
MAX_ENTRY = DIRECTORY.size + 3 * 0xFFFF  # bytes: header, name, extra fields and comment
END_SEARCHED = 66_000  # bytes at the end of an archive that are searched for the end record

RECORD = np.dtype(
    [("offset", "<u8"), ("packed", "<u4"), ("size", "<u4"), ("crc", "<u4"), ("method", "<u4")]
)

MOST = [int(np.iinfo(RECORD[name]).max) for name in RECORD.names or ()]  # more than of any image


class Entry(NamedTuple):
    """An entry of the central directory: name, offset, sizes in bytes, checksum and method."""

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    method: int


class ZipSource(Bounded):
    """Random access to images of a zip archive; see :class:`~.source.Source`.

    A table holds the entries: ``zipfile`` of the standard library takes a kilobyte for each.

    Args:
        archive: the zip.
        listing: lines of ``path<TAB>label``, such as ``train_map.txt``; None = each image's folder
            in the archive is its class.

    Attributes:
        table: ``RECORD`` [N], the images' entries.

    Raises:
        ValueError: archive or list are damaged, or do not belong together; one line naming the
            file, the member or line, and the remedy.
    """

    def __init__(self, archive: Path, listing: Path | None) -> None:
        self.archive, self.passed_over, self._around = archive, "", ""
        self._bytes = archive.stat().st_size
        if listing is None:
            self._by_folder()
        else:
            self._by_list(listing)
        self.runs = np.array([len(self.labels)], np.int64)
        self.class_counts = np.bincount(self.labels, minlength=len(self.class_names or ()))
        self._file: IO[bytes] | None = None

    def _by_folder(self) -> None:
        names, records, parents = Names(), array("Q"), array("i")
        number: dict[str, int] = {}
        folders, passed = set(), PassedOver()
        last, in_order = Entry("", 0, 0, 0, 0, 0), True
        for entry in _entries(self.archive):
            if (parent := _class_folder(entry.name)) is not None:
                in_order = in_order and _follows(entry.name, last.name)
                last = entry
                names.append(entry.name)
                records.extend(entry[1:])
                parents.append(number.setdefault(parent, len(number)))
                continue
            folders.add(folder := entry.name.rpartition("/")[0])
            if not entry.name.endswith("/") and not among_companions(folder):
                passed.add(entry.name)
        names.freeze()
        self.passed_over = passed.line()
        class_of, all_classes, self._around = _class_names(number, folders)
        self.class_names: list[str] | None = all_classes
        ranks = {name: rank for rank, name in enumerate(self.class_names)}
        label_of = np.array([ranks[name] for name in class_of], np.int32)
        places = np.array(parents, np.int64)
        self._names, self.table, self.labels = names, pack_records(records), label_of[places]
        if not in_order:
            order = _walk(names, places, list(number))
            self._names = Names()
            order = order[_last_of_each(names, places, order)]
            for place in order.tolist():
                self._names.append(names[place])
            self._names.freeze()
            self.table, self.labels = self.table[order], self.labels[order]

    def _by_list(self, listing: Path) -> None:
        self._names, labels = Names(), array("i")
        for name, label in read_list(listing):
            self._names.append(name)
            labels.append(label)
        self._names.freeze()
        # Hashes instead of names as keys: 16 bytes per image instead of 150.
        wanted = np.array([_hash(self._names[i]) for i in range(len(labels))], np.int64)
        order = np.argsort(wanted)
        ordered = wanted[order]
        for at in np.flatnonzero(ordered[1:] == ordered[:-1]).tolist():
            name = self._names[int(order[at])]
            if name == self._names[int(order[at + 1])]:
                raise ValueError(f"{listing}: '{name}' is listed twice")
        self.table = np.zeros(len(labels), RECORD)
        found = np.zeros(len(labels), bool)
        for entry in _entries(self.archive):
            at = int(np.searchsorted(ordered, _hash(entry.name)))
            if at < len(order) and self._names[place := int(order[at])] == entry.name:
                self.table[place] = tuple(map(min, entry[1:], MOST))
                found[place] = True
        if not found.all():
            name = self._names[int(np.argmin(found))]
            raise ValueError(
                f"{self.archive}: {(~found).sum():,} images of {listing.name} are not in it, first "
                f"'{name}': give the archive and the list of one data set"
            )
        self.labels, self.class_names = np.array(labels, np.int32), None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # an open file does not survive pickling

    def describe(self) -> str:
        below = f", classes are the folders in {plain(self._around)}" * bool(self._around)
        return f"zip ({self.archive}, {decimal(self._bytes)}{below})"

    def key(self, index: int) -> str:
        return f"{self.archive}:{self._names[index]}"

    def read(self, index: int) -> bytes:
        if self._file is None:
            self._file = self.archive.open("rb", buffering=0)
        record = self.table[index]
        offset, packed, size = (int(record[name]) for name in ("offset", "packed", "size"))
        self.checked_size(max(packed, size))
        # pread does not move the file position: forked workers may share the open file.
        header = os.pread(self._file.fileno(), LOCAL.size, offset)
        if len(header) < LOCAL.size or header[:4] != b"PK\x03\x04":
            raise ValueError("no entry of the archive begins where its directory says")
        name_size, extra_size = LOCAL.unpack(header)[-2:]
        start = offset + LOCAL.size + name_size + extra_size
        data = os.pread(self._file.fileno(), packed, start)
        if record["method"] == DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise ValueError(f"the archive is damaged ({error})") from None
        if len(data) != size or zlib.crc32(data) != record["crc"]:
            raise ValueError("the archive is damaged (checksum or size differ)")
        return data


def zipped_class_folders(archive: Path) -> list[str]:
    """Return the sorted names of the class folders in an archive without a list."""
    parents: dict[str, int] = {}
    folders = set()
    for entry in _entries(archive):
        if parent := _class_folder(entry.name):
            parents[parent] = 0
        else:
            folders.add(entry.name.rpartition("/")[0])
    return _class_names(parents, folders)[1]


def _class_folder(name: str) -> str | None:
    """Return the folder of an image in an archive; None for any other file."""
    parent, _, file = name.rpartition("/")
    if among_companions(name) or not is_image(file):
        return None
    return parent or None


def _class_names(
    parents: Iterable[str], folders: Iterable[str]
) -> tuple[list[str], list[str], str]:
    """Return each folder's class, all classes sorted by name, and their common folder's path.

    The class is the first part of the path below the common parent of all folders of images.

    Args:
        parents: folders of images.
        folders: folders without images, since a class may be empty.
    """
    split = [parent.split("/") for parent in parents]
    shortest, common = min(map(len, split), default=0), 0
    while common < shortest - 1 and len({parts[common] for parts in split}) == 1:
        common += 1
    class_of = [parts[common] for parts in split]
    empty = {
        parts[common]
        for parts in (folder.split("/") for folder in folders if not among_companions(folder))
        if split and len(parts) > common and parts[:common] == split[0][:common]
    } - {""}
    return class_of, sorted(empty.union(class_of)), "/".join(split[0][:common]) if split else ""


def _follows(name: str, former: str) -> bool:
    """Return whether a folder's walk visits a file after another."""
    folder, _, file = name.rpartition("/")
    former_folder, _, former_file = former.rpartition("/")
    if folder == former_folder:
        return file > former_file
    return folder.split("/") > former_folder.split("/")


def _walk(names: Names, parents: np.ndarray, folders: list[str]) -> np.ndarray:
    """Return the order of the same files in a folder, as places in ``names``.

    Args:
        parents: of each name, its place in ``folders``.
    """
    ranks = np.empty(len(folders), np.int64)
    ranks[sorted(range(len(folders)), key=lambda i: folders[i].split("/"))] = range(len(folders))
    order = np.argsort(ranks[parents], kind="stable")
    ends = np.cumsum(np.bincount(ranks[parents], minlength=len(folders)))
    for start, end in pairwise([0, *ends.tolist()]):
        order[start:end] = sorted(order[start:end].tolist(), key=names.__getitem__)
    return order


def _last_of_each(names: Names, parents: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return a mask of a walk's last entry of each name; earlier ones are replaced."""
    keep = np.ones(len(order), bool)
    for at, (place, after) in enumerate(pairwise(order.tolist())):
        keep[at] = parents[place] != parents[after] or names[place] != names[after]
    return keep


def _hash(name: str) -> int:
    return hash(name)  # names of equal hashes are compared


def pack_records(records: array) -> np.ndarray:
    """Return a table of ``RECORD`` from the numbers of all entries, one entry after the other."""
    columns = np.array(records, np.uint64).reshape(-1, len(RECORD.names or ()))
    table = np.empty(len(columns), RECORD)
    for place, (name, most) in enumerate(zip(RECORD.names or (), MOST, strict=True)):
        table[name] = np.minimum(columns[:, place], np.uint64(most))
    return table


def _entries(archive: Path) -> Iterator[Entry]:
    """Yield the files and folders of an archive; a folder's name ends in a slash.

    Raises:
        ValueError: it is no zip, truncated, encrypted, or compressed in an unusual way.
    """
    with archive.open("rb") as file:
        start, size = _directory(file, archive)
        file.seek(start)
        buffer, at = b"", 0
        while size or at < len(buffer):
            if len(buffer) - at < MAX_ENTRY and size:
                more = file.read(min(CHUNK, size))
                if not more:
                    raise _damaged(archive)
                buffer, at, size = buffer[at:] + more, 0, size - len(more)
            entry, used = parse_entry(buffer, at, archive)
            at += used  # cutting the buffer would copy megabytes per entry
            yield entry


def parse_entry(buffer: bytes, start: int, archive: Path) -> tuple[Entry, int]:
    """Parse an entry of the central directory; return it and its size in bytes.

    Raises:
        ValueError: see :func:`_entries`.
    """
    if len(buffer) - start < DIRECTORY.size:
        raise _damaged(archive)
    fields = DIRECTORY.unpack_from(buffer, start)
    flags, method = fields[3], fields[4]
    crc, packed, size, name_size, extra_size, comment_size = fields[7:13]
    offset = fields[16]
    used = DIRECTORY.size + name_size + extra_size + comment_size
    if fields[0] != b"PK\x01\x02" or len(buffer) - start < used:
        raise _damaged(archive)
    name_end = start + DIRECTORY.size + name_size
    raw = buffer[start + DIRECTORY.size : name_end]
    name = _decoded(raw, flags & 0x800 != 0)
    if fields[1] >> 8 == DOS:  # some programs there separate folders by backslashes
        name = name.replace("\\", "/")
    name = name.removeprefix("./") or "/"
    if flags & 1 or method not in (STORED, DEFLATED):
        raise ValueError(
            f"{archive}: '{plain(name)}' is encrypted or compressed in an unusual way: zip the "
            "images again, best stored (zip -0)"
        )
    if 0xFFFFFFFF in (packed, size, offset):
        try:
            extra = _zip64(buffer[name_end : name_end + extra_size])
            size = next(extra) if size == 0xFFFFFFFF else size
            packed = next(extra) if packed == 0xFFFFFFFF else packed
            offset = next(extra) if offset == 0xFFFFFFFF else offset
        except (StopIteration, struct.error):
            raise _damaged(archive) from None
    return Entry(name, offset, packed, size, crc, method), used


def _decoded(name: bytes, is_utf8: bool) -> str:
    """Decode a name as UTF-8, often unmarked, or as cp437, which is hardly ever valid UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        return name.decode("utf-8")
    return name.decode("utf-8" if is_utf8 else "cp437", "surrogateescape")


def _zip64(extra: bytes) -> Iterator[int]:
    """Yield the large numbers of an entry from its extra fields."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            yield from struct.unpack_from(f"<{size // 8}Q", extra, 4)
        extra = extra[4 + size :]


def _directory(file: IO[bytes], archive: Path) -> tuple[int, int]:
    """Return the offset and size in bytes of the central directory."""
    total = file.seek(0, os.SEEK_END)
    file.seek(max(0, total - END_SEARCHED))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise _damaged(archive)
    size, start = struct.unpack_from("<2L", tail, at + 12)
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # zip64
        (place,) = struct.unpack_from("<Q", tail, at - 20 + 8)
        if place > total - 56:
            raise _damaged(archive)
        file.seek(place)
        record = file.read(56)
        if record[:4] != b"PK\x06\x06":
            raise _damaged(archive)
        size, start = struct.unpack_from("<2Q", record, 40)
    if start + size > total:
        raise _damaged(archive)
    return start, size


def _damaged(archive: Path) -> ValueError:
    return ValueError(f"{archive}: not a zip archive, or a truncated one: copy it again")
