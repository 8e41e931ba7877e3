"""Builds the compiled ops, ``swin_moe/_C.so``, and copies ``configs/`` and ``launch/`` into wheels.

Everything else is in ``pyproject.toml``.

The library holds the CPU kernels always, and the CUDA kernels iff torch was built for CUDA and a
CUDA toolkit is found. A GPU is never asked for, so a login node or a container build will do.

Environment: ``SWIN_MOE_BUILD_CUDA=0`` leaves the CUDA kernels out, ``TORCH_CUDA_ARCH_LIST`` names
the GPU architectures, ``CUDA_HOME`` the toolkit, ``MAX_JOBS`` the parallel compilations.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def find_toolkit() -> str | None:
    """The CUDA toolkit's folder, also where ``nvcc`` on the PATH is a wrapper script."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named or nvcc is None:
        return named  # None: torch looks in the usual place
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    steps = subprocess.run(dry_run, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else None


if toolkit := find_toolkit():
    os.environ["CUDA_HOME"] = toolkit  # torch reads it when the next line imports it

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

CSRC = Path("swin_moe/csrc")


def why_no_cuda() -> str:
    """Why the CUDA kernels are left out, or nothing if they are built."""
    if os.environ.get("SWIN_MOE_BUILD_CUDA", "1") == "0":
        return "SWIN_MOE_BUILD_CUDA=0"
    if not torch.version.cuda:
        return "torch was built without CUDA"
    home = cpp_extension.CUDA_HOME
    if not home or shutil.which("nvcc", path=os.path.join(home, "bin")) is None:
        return f"no nvcc in {home or 'the usual places'}"
    return ""


NO_CUDA = why_no_cuda()
# Without a GPU to ask, torch wants the list. PTX serves the architectures that come after.
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")


def extension():
    """The one library. It contains no Python, so any interpreter and torch ≥ 2.11 can load it."""
    device_kinds = ["cpu"] if NO_CUDA else ["cpu", "cuda"]
    sources = [CSRC / f"bind_{kind}.cpp" for kind in device_kinds]
    sources += sorted((CSRC / "cpu").glob("*.cpp"))
    flags = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    options: dict = {
        "extra_compile_args": {"cxx": [*flags, "-g0", "-fvisibility=hidden"], "nvcc": flags},
        "depends": [str(path) for path in sorted(CSRC.rglob("*.h")) + sorted(CSRC.rglob("*.cuh"))],
        "py_limited_api": True,  # links neither Python nor torch's Python bindings
    }
    make = cpp_extension.CppExtension
    if not NO_CUDA:
        make = cpp_extension.CUDAExtension
        sources += sorted((CSRC / "cuda").glob("*.cu"))
    return make("swin_moe._C", [str(path) for path in sources], **options)


class BuildOps(cpp_extension.BuildExtension):
    """Keeps the object files between installs and says what was built."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install compiles in a temporary folder: nothing would ever be up to date.
        self.build_temp = os.path.join("build", "ops-cpu" if NO_CUDA else "ops-cuda")

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if NO_CUDA:
                raise
            raise SystemExit(
                f"swin_moe: the compiled ops did not build with CUDA from {cpp_extension.CUDA_HOME}"
                f" ({error}). To build them for the CPU only, set SWIN_MOE_BUILD_CUDA=0."
            ) from error
        kinds = f"the CPU only ({NO_CUDA})" if NO_CUDA else "CPU and CUDA"
        print(f"swin_moe: compiled ops built for {kinds}")


class BuildPackage(build_py):
    """Takes the recipes and the launch scripts along, see ``swin_moe/common/shipped.py``."""

    def _plain_files(self) -> list[tuple[str, str, str, list[str]]]:
        """Return package, source folder, target folder and names of the files of each folder."""
        targets = {Path("launch"): "swin_moe/launch"}
        for folder in {path.parent for path in Path("configs").rglob("*.yaml")}:
            targets[folder] = str("swin_moe/recipes" / folder.relative_to("configs"))
        return [
            (
                "swin_moe",
                str(folder),
                os.path.join(self.build_lib, target),
                sorted(path.name for path in folder.iterdir() if path.is_file()),
            )
            for folder, target in sorted(targets.items())
        ]

    def _get_data_files(self) -> list[tuple[str, str, str, list[str]]]:
        return [*super()._get_data_files(), *self._plain_files()]

    def get_data_files_without_manifest(self) -> list[tuple[str, str, str, list[str]]]:
        return [*super().get_data_files_without_manifest(), *self._plain_files()]


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildOps, "build_py": BuildPackage},
    # An editable install by a line in a .pth file: setuptools' own finder comes after Python's,
    # which takes a clone named swin_moe in the current folder for a package without an __init__.
    options={"editable_wheel": {"mode": "compat"}},
)
