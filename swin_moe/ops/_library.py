"""The compiled library: the only module that loads it, declares its ops and knows what it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("swin_moe")

BUILD_HINT = "build them with `pip install --no-build-isolation -e .`"
# What the kernels of each device take. Other dtypes go to the reference, see `has_kernel`.
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

_PACKAGE = Path(__file__).parent.parent
_declarations = torch.library.Library("swin_moe", "FRAGMENT")
_op_names: list[str] = []
_reference_only: list[str] = []


def declare(schema: str, reference: Callable[..., object]) -> None:
    """Declare an op with the reference that runs wherever no compiled kernel is registered.

    Args:
        schema: ``name(arguments) -> results``. A backward is an op of its own, ``name_backward``.
        reference: PyTorch implementation, not differentiated through.
    """
    name = schema.split("(", 1)[0]
    _declarations.define(schema)
    _declarations.impl(name, reference, "CompositeExplicitAutograd")
    _op_names.append(name)


def declare_reference(name: str) -> None:
    """Name an op that has no kernels yet, so that :func:`status` says so."""
    _reference_only.append(name)


def load(folder: Path = _PACKAGE) -> bool:
    """Load ``_C*.so`` from a folder, and log in one line what the ops run on.

    Returns:
        Whether it was loaded. Without it every op runs its reference.
    """
    paths = sorted(folder.glob("_C*.so"))
    problem = "" if paths else "not built"
    try:
        for path in paths:
            torch.ops.load_library(path)
    except (ImportError, OSError) as error:
        problem = f"not loadable ({str(error).strip().splitlines()[0]})"
    if problem:
        logger.warning("compiled ops %s, slow references are used: %s", problem, BUILD_HINT)
    else:
        logger.info("ops: %s", ", ".join(f"{op} {what}" for op, what in status().items()))
    return not problem


def _fused_on(op: str, device_type: str) -> bool:
    """Whether an op, with its backward where it has one, is compiled for a device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    names = [name for name in (op, f"{op}_backward") if name in _op_names]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has_kernel(f"swin_moe::{name}", key) for name in names)


def status() -> dict[str, str]:
    """What each op runs on: ``"fused (cpu)"``, ``"fused (cpu, cuda)"`` or ``"reference"``."""
    result = {}
    for op in _op_names:
        if not op.endswith("_backward"):
            devices = [kind for kind in KERNEL_DTYPES if _fused_on(op, kind)]
            result[op] = f"fused ({', '.join(devices)})" if devices else "reference"
    return result | dict.fromkeys(_reference_only, "reference")


def require_fused(device_type: str) -> None:
    """Insist that every op that has kernels is compiled for a device.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: an op would run its reference there.
    """
    if device_type not in KERNEL_DTYPES:
        raise ValueError(f"ops: no kernels exist for device {device_type!r}, only for cpu and cuda")
    missing = [op for op in status() if op in _op_names and not _fused_on(op, device_type)]
    if missing:
        raise ValueError(
            f"ops.require_fused: not compiled for {device_type}: {', '.join(missing)};"
            f" {BUILD_HINT}" + (" where nvcc is found" if device_type == "cuda" else "")
        )


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Whether a compiled kernel of an op may serve a tensor of this device and dtype."""
    kind = tensor.device.type
    return tensor.dtype in KERNEL_DTYPES.get(kind, ()) and _fused_on(op, kind)
