"""The CUDA kernel of AdamW with bf16 moments, run on the CPU by ``tests/cuda_emulation``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from swin_moe.ops import AdamwFactors, adamw
from tests.ops import adamw_cases as cases
from tests.ops.emulation import Guarded, build_emulation, pointers
from tests.ops.test_cuda_emulated import DTYPES


class Factors(ctypes.Structure):
    _fields_ = [("step", ctypes.c_uint64)] + [
        (name, ctypes.c_float) for name in AdamwFactors._fields[1:]
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_emulation(tmp_path_factory.mktemp("emulation"), "adamw")


def run(library: ctypes.CDLL, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, gradient, _ = tensors
    size, dtype = ctypes.c_int64(weights.numel()), DTYPES.index(gradient.dtype)
    factors = ctypes.byref(Factors(*cases.FACTORS))
    error = library.adamw(factors, size, dtype, *pointers(*tensors))
    assert error == 0, (error, library.emulation_error().decode())


@pytest.mark.parametrize("dtype", adamw.GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("size", cases.SIZES)
def test_the_bits_are_the_reference_s(library: ctypes.CDLL, size: int, dtype: torch.dtype) -> None:
    for offsets in cases.OFFSETS if size <= 1000 else cases.OFFSETS[:2]:
        inputs = cases.inputs(size, dtype, seed=size)
        places = [
            Guarded(tuple(tensor.shape), tensor.dtype, offset)
            for tensor, offset in zip(inputs, offsets, strict=True)
        ]
        for place, tensor in zip(places, inputs, strict=True):
            place.tensor.copy_(tensor)
        run(library, (places[0].tensor, places[1].tensor, places[2].tensor))
        found = [place.check() for place in places]
        cases.compare((found[0], found[2]), cases.reference(*inputs))
        assert torch.equal(found[1], inputs[1])


def test_vectors_are_used_where_all_tensors_are_aligned(library: ctypes.CDLL) -> None:
    """Then a block of 256 threads updates 1,024 elements."""
    blocks = []
    for offset in (0, 1):
        tensors = [cases.placed(t, offset) for t in cases.inputs(4096, torch.float32)]
        run(library, (tensors[0], tensors[1], tensors[2]))
        blocks.append(library.blocks_of_the_last_launch())
    assert blocks == [4, 16]


def test_a_nan_of_any_bits_stays_one(library: ctypes.CDLL) -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0], dtype=torch.int32)
    weights, pairs = torch.ones(5), torch.zeros(5)
    run(library, (weights, bits.view(torch.float32), pairs))
    assert weights.isnan().tolist() == [True] * 4 + [False]
    assert pairs.view(torch.int32).tolist() == [0x7FC07FC0] * 4 + [0]
