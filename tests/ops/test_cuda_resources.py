"""Registers and spills of the CUDA kernels, as ptxas reports them: a compiler, but no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cuda_resources

# The most registers of a thread for so many threads of an SM, which has 65,536 registers.
REGISTERS = {256: 255, 384: 168, 512: 128, 640: 96, 1024: 64, 1536: 40}
# For each source, the threads that an SM is to hold of a kernel: by the start of its name, the
# first that fits. Any kernel of a source in this table must not spill.
SOURCES = {
    "window_attention_forward": {
        "forward_kernel<float32": 256,
        "forward_kernel<bfloat16, 32, true": 512,
        "forward_kernel<float16, 32, true": 512,
        "forward_kernel<": 384,
    },
    "window_attention_backward": {
        "query_kernel<bfloat16, 16, true": 512,
        "query_kernel<bfloat16, 32, true": 512,
        "query_kernel<float16, 16, true": 512,
        "query_kernel<float16, 32, true": 512,
        "key_kernel<bfloat16, 16, true": 512,
        "key_kernel<bfloat16, 32, true": 512,
        "key_kernel<float16, 16, true": 512,
        "key_kernel<float16, 32, true": 512,
        "reduce_": 512,
        "": 256,
    },
    "moe_route": {"score_kernel": 640, "": 1024},
    "moe_route_backward": {"": 1024},
    "moe_route_plan": {"": 1024},
    "moe_route_queues": {"sort_kernel": 512, "": 1024},
    "moe_activation": {"": 1024},
    "moe_dispatch": {"": 1024},
    "adamw": {"": 1536},
}
Usages = dict[tuple[str, int], dict[str, cuda_resources.Usage]]


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> Usages:
    if cuda_resources.nvcc() is None:
        pytest.skip("no nvcc")
    sources = [cuda_resources.CUDA / f"{stem}.cu" for stem in SOURCES]
    folder = tmp_path_factory.mktemp("cubins")
    compiled = cuda_resources.compile_all(sources, cuda_resources.ARCHITECTURES, folder)
    return {(path.stem, sm): kernels for (path, sm), (kernels, _) in compiled.items()}


@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_registers(usages: Usages, source: str, architecture: int) -> None:
    kernels = usages[source, architecture]
    assert kernels
    starts = SOURCES[source]
    unused = [start for start in starts if not any(name.startswith(start) for name in kernels)]
    assert not unused, "no kernel is called so"
    for name, used in kernels.items():
        start = next(start for start in starts if name.startswith(start))
        assert used.spills == 0, (name, used)
        assert used.registers <= REGISTERS[starts[start]], (name, used)


LOG = """
ptxas info    : Compiling entry function '_ZN9x10key_kernelI13__nv_bfloat16Li32ELb1EEEvNS0_' for 'a'
    8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 40 bytes smem
ptxas info    : Compiling entry function '_ZN9x11plan_kernelEPKf' for 'a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers
"""


def test_usage_is_read() -> None:
    assert cuda_resources.usage(LOG) == {
        "key_kernel<bfloat16, 32, true>": (128, 20, 40),
        "plan_kernel": (31, 0, 0),
    }


def test_the_fastest_way_of_a_loop() -> None:
    """A turn skips what it may, but no product, and the shortest loop with products counts."""
    texts = [
        "MOV R1, R2", "HMMA.16816.F32 R0, R1", "@P0 BRA 0x50", "FADD R1, R1", "FADD R1, R1",
        "@!P1 BRA 0x80", "HMMA.16816.F32 R0, R1", "MUFU.EX2 R1, R1", "@P2 BRA 0x10",
        "FMUL R1, R1", "@P3 BRA 0x0",
    ]  # fmt: skip
    loop = cuda_resources.inner_loop([(16 * i, text) for i, text in enumerate(texts)])
    assert loop == (8, 6, {"BRA": 3, "HMMA": 2, "MUFU": 1})
    assert cuda_resources.inner_loop([(0, "FADD R1, R1"), (16, "@P0 BRA 0x0")]) is None


def test_all_attention_sources_are_listed() -> None:
    found = {path.stem for path in Path(cuda_resources.CUDA).glob("window_attention*.cu")}
    assert found <= set(SOURCES)
