"""Detection of a file's format by its first bytes, before it is read as weights."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

from ..common.reading import check_regular
from ..common.text import plain

Kind = Literal["safetensors", "zip", "legacy"]
"""safetensors, torch.save's zip, or torch.save's format before version 1.6."""

_HEAD = 4096  # bytes that are read
_HEADER_LIMIT = 100_000_000  # bytes of a safetensors header, the safetensors library's limit
_SMALL = 64 << 20  # bytes of a zip's lists and pickle: everything but the tensors
_SHRUNK = 16  # times the size of a compressed zip that it may expand to
# torch.save's magic number in pickle protocol 2.
_LEGACY = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")
_AGAIN = "download or copy it again"

# First bytes of a file -> its format, and the remedy.
_KNOWN: dict[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer, not the file that it stands "
    "for: run `git lfs pull` in the clone that it is in",
    b"\x1f\x8b": "a gzip archive: unpack it (`gunzip`, or `tar xzf` for a .tar.gz)",
    b"BZh": "a bzip2 archive: unpack it",
    b"\xfd7zXZ": "an xz archive: unpack it",
    b"(\xb5/\xfd": "a zstd archive: unpack it",
    b"7z\xbc\xaf'\x1c": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras and TensorFlow write: only PyTorch's and "
    "safetensors files are read",
    b"\x93NUMPY": "a NumPy array (.npy), one tensor without a name",
    b"GGUF": "a GGUF file: only PyTorch's and safetensors files are read",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"PAR1": "a parquet table",
    b"PK\x05\x06": "an empty zip archive",
}
_NOT_READ = "only PyTorch's and safetensors files are read"


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message is one line for the user."""


class ZipFacts(NamedTuple):
    """Sizes of the records in a zip of torch.save, and whether any is compressed."""

    sizes: set[int]
    compressed: bool


def kind_of(path: Path) -> Kind:
    """Return the format of a file of weights, whatever its suffix.

    Raises:
        WeightsError: it is no regular file, cannot be read, or has another format, which the line
            names.
    """
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise WeightsError(unreadable(path, error)) from None
    except ValueError as error:
        raise WeightsError(str(error)) from None
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[:1] == b"\x80" and _LEGACY in head[:20]:
        return "legacy"
    length = int.from_bytes(head[:8], "little")
    # A header may be padded at its end, but must begin with a JSON object.
    if head[8:9] == b"{":
        if length > min(_HEADER_LIMIT, size - 8):
            raise WeightsError(
                f"{plain(path)}: truncated or not a safetensors file (its header claims {length:,} "
                f"bytes, the file has {size:,}): {_AGAIN}"
            )
        return "safetensors"
    raise WeightsError(f"{plain(path)} is {_what(head, path)}")


def _what(head: bytes, path: Path) -> str:
    if not head:
        return f"empty (0 bytes): {_AGAIN}"
    for start, what in _KNOWN.items():
        if head.startswith(start):
            return what
    if not head.strip(b"\0"):
        return f"all zeros at its beginning, like an interrupted download: {_AGAIN}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it and name the file of weights in it"
    return _text(head) or _binary(head, path)


def _text(head: bytes) -> str:
    """Describe a text; return an empty string for other data."""
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < _HEAD else "ignore").strip()
    except UnicodeDecodeError:
        return ""
    if not text or not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return ""
    first = plain(" ".join(text.split())[:40])
    if re.match(r"(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|script)\b", text, re.I | re.S):
        return "a web page (HTML), not weights: use the address that the page's download link has"
    if "/annex/objects/" in text:
        return "a git-annex pointer, not the file that it stands for: run `git annex get` there"
    if text.startswith("<"):
        return f"XML text that begins {first!r}, not weights: {_AGAIN}"
    if text.startswith(("{", "[")):
        return f"JSON text that begins {first!r}, not weights"
    return f"text that begins {first!r}, not weights: {_AGAIN}"


def _binary(head: bytes, path: Path) -> str:
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model: {_NOT_READ}"
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42"):
        name = "TensorFlow SavedModel" if head[1] == 1 else "ONNX"
        return f"a {name} graph: {_NOT_READ}"
    if re.match(rb"([\x81-\x8f]|\xde..|\xdf....)([\xa1-\xbf]|\xd9.)[\w/]", head, re.S):
        return f"a MessagePack file, as flax writes: {_NOT_READ}"  # a map whose keys are names
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return (
            "a plain Python pickle, not one of torch.save: reading it could run code. Where you "
            "trust it, load it there and torch.save its dictionary of tensors"
        )
    return f"neither PyTorch's nor safetensors (it begins {head[:8].hex(' ')}): {_AGAIN}"


def unreadable(path: Path, error: Exception) -> str:
    """Return the message for a failure to read a file.

    Damage was never seen to raise ``OSError``: the file system raises it.
    """
    if isinstance(error, OSError):
        return f"{plain(path)}: cannot be read ({error.strerror or error})"
    first = str(error).partition("\n")[0] or type(error).__name__
    if "mmap" in first:
        size = os.stat(path).st_size
        return f"{plain(path)}: has {size:,} bytes, which this machine's memory cannot map"
    return f"{plain(path)}: truncated or not a PyTorch file ({plain(first)[:100]})"


# --------------------------------------------------------------------------------------------
# torch.save's zip


class _Bounded(io.BufferedReader):
    """A file that refuses reads larger than a zip's list of entries may be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _SMALL:
            raise zipfile.BadZipFile("its list of entries is too long")
        return super().read(size)


def check_zip(path: Path) -> ZipFacts:
    """Check a zip's list of entries before torch allocates memory for them.

    Raises:
        WeightsError: it cannot be read, is truncated, holds other data, or its entries claim too
            many bytes.
    """
    size = os.stat(path).st_size
    try:
        with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        first = error.__context__ or error  # zipfile replaces some errors of the file system
        if isinstance(first, OSError):
            raise WeightsError(unreadable(path, first)) from None
        why = "its end is missing" if "not a zip file" in str(error) else str(error)
        raise WeightsError(
            f"{plain(path)}: truncated or not a PyTorch file ({why}): {_AGAIN}"
        ) from None
    names = {entry.filename for entry in entries}
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise WeightsError(f"{plain(path)} is {_other_zip(names)}")
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{plain(path)} is a TorchScript program, which is code: where you trust it, save "
            "torch.jit.load(file).state_dict() by torch.save"
        )
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size * (_SHRUNK if compressed else 1):
        raise WeightsError(
            f"{plain(path)}: its entries claim {claimed:,} bytes, the file has {size:,}: damaged, "
            "or made to fill the memory"
        )
    small = [e for e in entries if not re.search(r"(^|/)data/\d+$", e.filename)]
    if (most := max(entry.file_size for entry in small)) > _SMALL:
        raise WeightsError(
            f"{plain(path)}: holds {most:,} bytes in addition to its tensors; at most {_SMALL:,} "
            "are read"
        )
    return ZipFacts({entry.file_size for entry in entries}, compressed)


def _other_zip(names: set[str]) -> str:
    if not names:
        return "an empty zip archive"
    if "model.weights.h5" in names:
        return f"a Keras model: {_NOT_READ}"
    if all(name.endswith(".npy") for name in names):
        return f"a NumPy archive (.npz): {_NOT_READ}"
    if any(name.endswith("archive_format") for name in names):
        return f"a program of torch.export (.pt2): {_NOT_READ}"
    held = sorted(name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors")))
    if held:
        return f"a zip archive that holds {plain(held[0])}: unpack it and name that file"
    return f"a zip archive of something else (it holds {plain(min(names))}), not weights"
