"""Collects facts of the machine: card, driver, packages, tools, and measured rates.

Fails with one line that names what is missing: a GPU, torch 2.11 or later, pytest.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from benchmarks import harness, kernels
from benchmarks.first_contact import options as common
from benchmarks.first_contact.sanitizer import find_sanitizer

NEEDED = ("torch", "pytest", "numpy", "rich", "safetensors", "timm")
WANTED = (
    "torchvision", "triton", "transformers", "pydantic", "pydantic-core", "deepspeed", "fairscale",
    "simplejpeg", "webdataset", "hjson", "msgpack", "ninja", "py-cpuinfo", "einops", "psutil",
    "setuptools",
)  # fmt: skip


def version(package: str) -> str:
    """Return a package's version; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def nvcc_version() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    return next((line for line in done.stdout.splitlines() if "release" in line), "")


def problem(device: str, versions: dict[str, str]) -> str:
    """Return why the other steps cannot run, or nothing."""
    missing = [name for name in NEEDED if not versions[name]]
    if missing:
        return f"not installed: {', '.join(missing)}; carry their wheels (gpu_wheels.sh)"
    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if tuple(map(int, versions["torch"].split("+")[0].split(".")[:2])) < (2, 11):
        return f"torch {versions['torch']} is too old: the library is built for 2.11 and later"
    return ""


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    versions = {name: version(name) for name in (*NEEDED, *WANTED)}
    versions |= {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    versions["nvcc"] = nvcc_version()
    absent = [name for name in WANTED if not versions[name]]
    harness.choose_device(options.device)
    error = problem(options.device, versions)
    machine: dict[str, object] = {
        "cores": os.cpu_count(),
        "compute_sanitizer": str(find_sanitizer() or ""),
    }
    if not error:
        machine = harness.machine() | machine
    print(f"{machine}\n{versions}\nnot installed: {', '.join(absent) or 'nothing'}", flush=True)
    common.write(options, versions=versions, machine=machine, not_installed=absent)
    if error:
        raise SystemExit(error)
    ceilings = {
        name: kernels.ceilings(kernels.DTYPES[name], options.quick).as_json()
        for name in ("bfloat16", "float32")
    }
    print(ceilings)
    common.write(
        options, versions=versions, machine=machine, not_installed=absent, ceilings=ceilings
    )


if __name__ == "__main__":
    main()
