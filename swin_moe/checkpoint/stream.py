"""Writing a safetensors file tensor by tensor.

The library's own writer needs all tensors in memory at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_PIECE, _FLUSH = 1 << 24, 1 << 28  # bytes that are written, and flushed to disk, at once
_ROOM = (1 << 22) - 8  # bytes of the header of tensors that are not known before
_MOST = 10**15  # bytes of a file, whose number of digits bounds a header
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_file(tensors: Mapping[str, Tensor], path: Path, wrote: Callable[[], None]) -> None:
    """Write tensors that are all in memory, see :func:`stream_file`."""
    # Larger elements first, so that each begins at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header = json.dumps({name: _entry(tensor, _MOST)[0] for name, tensor in ordered})
    stream_file(ordered, path, wrote, -(-len(header) // 8) * 8)


def stream_file(
    tensors: Iterable[tuple[str, Tensor]],
    path: Path,
    wrote: Callable[[], None] = lambda: None,
    room: int = _ROOM,
) -> None:
    """Write tensors by name, of which only one need be in memory at a time.

    After an error, the rest is still consumed: the generator may have resources to give back.

    Args:
        wrote: called after each written piece.
        room: bytes reserved for the header, which comes first and is written last.

    Raises:
        OSError: the first error of the file system.
    """
    header: dict[str, Any] = {}
    position, problem = 0, None
    with path.open("wb") as file:
        file.seek(8 + room)
        pieces = _Pieces(file, wrote)
        for name, tensor in tensors:
            if problem is not None:
                continue
            flat = tensor.detach().cpu().contiguous().view(-1)
            header[name], position = _entry(tensor, position)
            try:
                pieces.write(flat)
            except OSError as error:
                problem = error
        if problem is not None:
            raise problem
        text = json.dumps(header).encode()
        assert len(text) <= room
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text.ljust(room))


def _entry(tensor: Tensor, position: int) -> tuple[dict[str, Any], int]:
    """Return a tensor's header entry for bytes from ``position`` on, and their end."""
    end = position + tensor.numel() * tensor.element_size()
    shape = list(tensor.shape)
    return {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}, end


class _Pieces:
    """A file that is written in pieces and flushed regularly, so that progress is visible."""

    def __init__(self, file: IO[bytes], wrote: Callable[[], None]) -> None:
        self._file, self._wrote, self._unflushed = file, wrote, 0

    def write(self, flat: Tensor) -> None:
        data = flat.view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            self._unflushed += self._file.write(data[start : start + _PIECE])
            if self._unflushed >= _FLUSH:
                self._file.flush()
                os.fdatasync(self._file.fileno())
                self._unflushed = 0
            self._wrote()
