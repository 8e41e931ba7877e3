#!/usr/bin/env bash
# Makes the folder of wheels for a GPU machine that has no package index, see docs/gpu.md.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu_wheels.sh [--python 3.12] [--with NAME,...] [DIR]
  DIR            the folder (default: build/wheels)
  --python X.Y   Python of the GPU machine (default: 3.12)
  --with A,B     more packages, for example timm or pytest
Versions are those of requirements/lock.txt. The machine itself has torch, torchvision, timm, numpy.
TEXT
}

wrong() { echo "error: $1 (see --help)" >&2; exit 2; }

# Packages that swin_moe needs and a machine with torch may lack; each has a few MB at most.
packages=(
  pydantic pydantic-core annotated-types typing-inspection typing-extensions
  deepspeed hjson msgpack ninja py-cpuinfo einops psutil packaging tqdm
  fairscale simplejpeg webdataset braceexpand
)
sources=(deepspeed fairscale) # published only as sources: their wheels are built here

version=3.12 folder=build/wheels
while [[ $# -gt 0 ]]; do
  case $1 in
    --python) version=${2:?} && shift 2 ;;
    --with) IFS=, read -ra more <<<"${2:?}" && packages+=("${more[@]}") && shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) wrong "unknown option $1" ;;
    *) folder=$1 && shift ;;
  esac
done
[[ $version =~ ^3\.[0-9]+$ ]] || wrong "--python $version is not a version"
python=.venv/bin/python
[[ -x $python ]] || wrong "no $python: run make setup first"

# The NAME==VERSION of a line of the lock, for a Python of this version.
pinned() {
  "$python" - "$1" "$version" <<'PYTHON'
import pathlib, sys
from packaging.requirements import Requirement
name, python = sys.argv[1:]
for line in pathlib.Path("requirements/lock.txt").read_text().splitlines():
    wanted = Requirement(line)
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    if wanted.name == name and (wanted.marker is None or wanted.marker.evaluate(there)):
        sys.exit(print(f"{name}{wanted.specifier}"))
sys.exit(f"error: requirements/lock.txt has no {name}")
PYTHON
}

mkdir -p -- "$folder"
rm -f -- "$folder"/*.whl
built=() ready=()
for package in "${packages[@]}"; do
  pin=$(pinned "$package")
  if [[ " ${sources[*]} " == *" $package "* ]]; then built+=("$pin"); else ready+=("$pin"); fi
done
platforms=()
for glibc in 17 24 26 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
echo "downloading ${#ready[@]} wheels for Python $version"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$version" --implementation cp "${platforms[@]}" --dest "$folder" "${ready[@]}"
echo "building ${built[*]}"
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
  --no-build-isolation --wheel-dir "$folder" "${built[@]}"

tag=${version/./}
for wheel in "$folder"/*.whl; do
  case $wheel in
    *-none-any.whl | *-cp"$tag"-* | *-abi3-* | *-py3-none-*linux*) ;;
    *) echo "error: $wheel is not for Python $version" >&2; exit 1 ;;
  esac
done
du -ch -- "$folder"/*.whl
