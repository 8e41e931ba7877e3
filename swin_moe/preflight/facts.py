"""Collects the facts of one process: versions, code, config, device, free memory and disk."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__, distributed, ops
from ..common import ranks
from ..common.host import free_memory
from ..config import Config, dump_config
from ..training.run_directory import git_commit

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Facts:
    """The facts of one process.

    Attributes:
        host: its name.
        local_rank: of the process on its host.
        versions: texts that ``agreement.py`` compares, by name.
        gpu: identity of the GPU; empty without one.
        memory: free bytes of the host.
        disk: free bytes of the disk of ``train.output``.
        gpu_free: bytes.
        gpu_total: bytes.
    """

    host: str
    local_rank: int
    versions: dict[str, str]
    gpu: str
    memory: int
    disk: int
    gpu_free: int
    gpu_total: int


def collect(config: Config) -> Facts:
    """Return the facts of this process; no process group is needed."""
    _, local_rank, _ = ranks.environment_rank()
    versions = {
        "config": _digest(dump_config(config).encode()),
        "swin_moe": __version__,
        "source": _source(),
        "compiled ops": ops.library_digest() or "not built",
        "torch": torch.__version__,
        "DeepSpeed": _version("deepspeed"),
        "backend": distributed.backend(),
        "NCCL": "none",
        "Python": platform.python_version(),
        "timm": _version("timm"),
        "CUDA": torch.version.cuda or "none",
        "driver": "none",
        "device": ops.cpu_instruction_set(torch.float32) or platform.machine(),
        "commit": git_commit() or "unknown",
    }
    gpu, free, total = "", 0, 0
    if torch.cuda.is_available():
        index = local_rank % torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(index)
        gpu = str(properties.uuid)
        free, total = torch.cuda.mem_get_info(index)
        versions["device"] = properties.name
        versions["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        versions["driver"] = _driver()
    disk = shutil.disk_usage(_existing(Path(config.train.output))).free
    return Facts(ranks.hostname(), local_rank, versions, gpu, free_memory(), disk, free, total)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _source() -> str:
    """Return a digest of the package's Python files, which may differ from the commit."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip() or "unknown"


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
