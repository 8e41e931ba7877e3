"""Marks of the devices on which an op's tests run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swin_moe import ops
from swin_moe.ops import _library


def needs_library(op: str) -> pytest.MarkDecorator:
    """Skip tests if the op has no compiled CPU kernel."""
    return pytest.mark.skipif(
        not ops.status()[op].startswith("compiled (cpu"),
        reason=f"the compiled library is not built; {_library.BUILD_HINT}",
    )


def needs_cuda(op: str) -> pytest.MarkDecorator:
    """Skip tests if the op has no CUDA kernel, or without a GPU."""
    return pytest.mark.skipif(
        not torch.cuda.is_available() or not _library.compiled_for(op, "cuda"),
        reason="no GPU, or the CUDA kernels are not built",
    )


def devices(op: str) -> list[Any]:
    """Return values for a parameter ``device``."""
    return ["cpu", pytest.param("cuda", marks=needs_cuda(op))]
