"""CUDA kernels on the CPU: their build with ``tests/cuda_emulation``, and guarded tensors."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
KERNELS = ROOT / "swin_moe" / "csrc" / "cuda"


def build_emulation(folder: Path, name: str, *more: str) -> ctypes.CDLL:
    """Build a library of all ``csrc/cuda/<name>*.cu`` and the launchers of these names."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    path = folder / f"{name}.so"
    flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-I", str(EMULATION)]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-DSWIN_MOE_CUDA_EMULATION", "-ffp-contract=off"]
    sources = [EMULATION / f"{stem}.cpp" for stem in ("machine", name, *more)]
    sources += sorted(KERNELS.glob(f"{name}*.cu"))
    subprocess.run([compiler, *flags, "-x", "c++", *map(str, sources), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.emulation_error.restype = ctypes.c_char_p
    return loaded


class Guarded:
    """A tensor of NaNs, or of large integers, between two margins that must not be written."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> None:
        size = math.prod(shape)
        nothing = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        self.all = torch.full((size + 128 + offset,), nothing, dtype=dtype)
        self.all[: 64 + offset] = self.all[64 + offset + size :] = 7
        self.margins = (slice(0, 64 + offset), slice(64 + offset + size, None))
        self.tensor = self.all[64 + offset : 64 + offset + size].view(shape)

    def check(self) -> Tensor:
        for margin in self.margins:
            assert bool((self.all[margin] == 7).all()), "written out of bounds"
        return self.tensor


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
