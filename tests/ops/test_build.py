"""Kernels include no headers of torch or Python. `.ci/run` compiles each CUDA source by itself."""

from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "swin_moe" / "csrc"
CUDA_SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


def test_there_are_kernels_to_check():
    assert CUDA_SOURCES
    assert sorted((CSRC / "cpu").glob("*.cpp"))


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_kernels_include_no_torch_headers(folder):
    for path in (CSRC / folder).iterdir():
        text = path.read_text()
        assert "<torch/" not in text, path
        assert "Python.h" not in text, path
