"""A safetensors file of tensors that are there only one after the other.

The library's writer wants all of them at once, which where they are read from files, or where
memory is short, is the very thing that cannot be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HEADER = 1 << 22  # bytes kept free for the header, which comes first and is known last
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


def stream_file(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write tensors by name; each may be gone when the next one comes.

    All of them are taken, even after an error: what makes them may hold what it gives back then.

    Raises:
        OSError: the first error of the file system.
    """
    header: dict[str, Any] = {}
    position, problem = 0, None
    with path.open("wb") as file:
        file.seek(_HEADER)
        for name, tensor in tensors:
            if problem is not None:
                continue
            flat = tensor.detach().cpu().contiguous().view(-1)
            end = position + flat.numel() * flat.element_size()
            header[name] = {
                "dtype": _DTYPES[flat.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            try:
                file.write(flat.view(torch.uint8).numpy().data)
            except OSError as error:
                problem = error
            position = end
        if problem is not None:
            raise problem
        text = json.dumps(header).encode()
        assert len(text) <= _HEADER - 8
        file.seek(0)
        file.write((_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8))
