"""Loads the compiled library, or builds it for this card; each op runs once.

A library is good if it loads, holds every op for the device, and runs. One that does not load, has
no CUDA kernels or none for this card is built again with ``TORCH_CUDA_ARCH_LIST`` of the card.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.first_contact import calls
from benchmarks.first_contact import options as common
from swin_moe import ops
from swin_moe.ops import _library

BUILT = "SWIN_MOE_BUILT_HERE"  # seconds that the build took
NO_IMAGE = "no kernel image"  # what CUDA says of a card that the library was not built for


def shortcoming(device: str) -> str:
    """Return why the library must be built here, or nothing."""
    if not ops.library_digest():
        return "no library was brought along"
    missing = [op for op in ops.status() if not _library.compiled_for(op, device)]
    if missing:
        return f"the library does not load, or has no {device} kernels of {', '.join(missing)}"
    try:
        if device == "cuda":
            calls.routing(torch.randn(8, 4, device=device), ops.RouteOptions())
    except RuntimeError as error:
        if NO_IMAGE in str(error):
            return "the library has no kernels for this card"
        raise
    return ""


def build() -> float:
    """Compile the library into the package, for this card; return the seconds.

    Raises:
        SystemExit: it does not compile.
    """
    major, minor = torch.cuda.get_device_capability()
    env = common.environment() | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    env.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    for path in Path(_library.PACKAGE).glob("_C*.so"):
        path.unlink()
    began = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if subprocess.run(command, env=env, check=False).returncode:
        raise SystemExit("the library does not compile here, see the log")
    return time.monotonic() - began


def try_setup() -> None:
    """Check that setup.py runs in this environment, up to the compilation.

    Raises:
        SystemExit: it does not.
    """
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or done.stdout.split()[-1:] != ["swin_moe"]:
        raise SystemExit(f"setup.py does not run here: {done.stderr.strip().splitlines()[-1:]}")


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    if options.quick:
        try_setup()
    ops.trust_kernels()
    why = shortcoming(options.device)
    if why:
        print(why, flush=True)
        if options.device == "cpu" or BUILT in os.environ:
            raise SystemExit(f"{why}; the build did not help" if BUILT in os.environ else why)
        env = os.environ | {BUILT: f"{build():.0f}"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
    status = ops.status()
    print(status)
    ops.require_fused(options.device)
    errors = calls.check(options.device)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    common.write(
        options,
        library={
            "digest": ops.library_digest(),
            "built_here_s": float(os.environ.get(BUILT, 0)) or None,
            "ops": status,
        },
        errors=errors,
    )


if __name__ == "__main__":
    main()
