"""The kernels compile by themselves, and setup.py chooses what to build."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "swin_moe" / "csrc"
CUDA_SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


def test_there_are_kernels_to_check():
    assert CUDA_SOURCES
    assert sorted((CSRC / "cpu").glob("*.cpp"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_kernels_compile_without_torch_or_a_gpu(source, tmp_path):
    command = ["nvcc", "-c", "-arch=sm_80", "-std=c++17", str(source), "-o", tmp_path / "out.o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_kernels_include_no_torch_headers(folder):
    for path in (CSRC / folder).iterdir():
        text = path.read_text()
        assert "<torch/" not in text, path
        assert "Python.h" not in text, path
