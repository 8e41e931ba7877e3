"""Runs memcheck and racecheck of compute-sanitizer over all ops, if the machine allows it.

A planted error is looked for first, with the same filter of kernels: where that is not found, the
tool is refused here or broken, and the step is not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.first_contact import options as common

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit code for errors
# Only kernels of this project: torch's own are many, slow to check, and not ours to mend.
FILTERS: tuple[list[str], ...] = (["--kernel-name", "kernel_substring=swin_moe"], [])
CALLS = ["-m", "benchmarks.first_contact.calls", "--quick"]
PROBE = """
#include <cstdio>
namespace swin_moe {
__global__ void planted(int* to) {
  __shared__ int shared;
  shared = threadIdx.x;          // a race of two warps
  to[threadIdx.x + 64] = shared; // behind the end
}
}  // namespace swin_moe
int main() {
  int* to = nullptr;
  if (cudaMalloc(&to, 64 * sizeof(int)) != cudaSuccess) return 3;
  swin_moe::planted<<<1, 64>>>(to);
  std::printf("%s\\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
"""


def find_sanitizer() -> Path | None:
    """Return the tool, on the PATH or in a toolkit."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"),) if home]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [home / "bin" / "compute-sanitizer" for home in homes]
    places += [home / "compute-sanitizer" / "compute-sanitizer" for home in homes]
    on_path = shutil.which("compute-sanitizer")
    return Path(on_path) if on_path else next((p for p in places if p.is_file()), None)


def build_probe(folder: Path) -> Path:
    """Compile the program with the planted errors.

    Raises:
        SystemExit: there is no nvcc, or it fails.
    """
    if shutil.which("nvcc") is None:
        common.not_run("no nvcc, which makes the probe of compute-sanitizer")
    source, program = folder / "probe.cu", folder / "probe"
    source.write_text(PROBE)
    done = subprocess.run(
        ["nvcc", "-arch=sm_80", str(source), "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"nvcc does not compile the probe: {done.stderr.strip()[:200]}")
    return program


def run(
    sanitizer: Path, tool: str, kernels: list[str], program: list[str], timeout: float = 60
) -> tuple[int, str]:
    """Return exit code and output of a program under a tool."""
    command = [str(sanitizer), "--tool", tool, *kernels, "--error-exitcode", str(FOUND)]
    command += ["--print-limit", "20", *program]
    env = common.environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # true ends of tensors
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env=env, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        return 124, str(expired.stdout or "")
    return done.returncode, done.stdout


def working_filter(sanitizer: Path, program: Path) -> tuple[list[str] | None, str]:
    """Return the first filter that finds the planted error, or the tool's output if none does."""
    output = ""
    for kernels in FILTERS:
        code, output = run(sanitizer, "memcheck", kernels, [str(program)], timeout=40)
        if code == FOUND and "planted" in output:
            return kernels, ""
        lines = [line for line in output.splitlines() if "error" in line.lower()] or [output]
        output = lines[0].strip("= ")[:150]
    return None, output


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build_probe(Path(folder))
        print("the probe compiles", flush=True)
        if options.device == "cpu":
            program_code = subprocess.run(
                [sys.executable, *CALLS, "--device", "cpu"], env=common.environment(), check=False
            ).returncode
            raise SystemExit(program_code)
        sanitizer = find_sanitizer()
        if sanitizer is None:
            common.write(options, sanitizer="not installed")
            common.not_run("compute-sanitizer is not installed")
        kernels, output = working_filter(sanitizer, program)
    if kernels is None:
        common.write(options, sanitizer=f"refused: {output}")
        common.not_run(f"compute-sanitizer does not work on this machine: {output}")
    print(f"the planted error is found, with the filter {kernels}", flush=True)
    results = {}
    for tool in TOOLS:
        code, output = run(
            sanitizer, tool, kernels, [sys.executable, *CALLS, "--device", options.device]
        )
        print(output, flush=True)
        results[tool] = {0: "no errors", FOUND: "errors", 124: "timed out"}.get(
            code, f"exit {code}"
        )
        common.write(options, sanitizer=results, filter=kernels)
    bad = {tool: what for tool, what in results.items() if what != "no errors"}
    if set(bad.values()) == {"timed out"}:
        common.not_run(f"compute-sanitizer is too slow here: {bad}")
    if bad:
        raise SystemExit(f"compute-sanitizer: {bad}")


if __name__ == "__main__":
    main()
