"""The compiled library; only this module loads it and declares its ops."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from ..common.text import reason

logger = logging.getLogger("swin_moe")

BUILD_HINT = "build them with `pip install --no-build-isolation -e .`"
# Dtypes of each device's kernels. For others the reference runs.
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

PACKAGE = Path(__file__).parent.parent
_declarations = torch.library.Library("swin_moe", "FRAGMENT")
_op_names: list[str] = []


def declare(schema: str, reference: Callable[..., object], *, internal: bool = False) -> None:
    """Declare an op with the reference that runs if no compiled kernel is registered.

    Args:
        schema: ``name(arguments) -> results``. A backward is an op of its own, ``name_backward``.
        reference: PyTorch implementation, not differentiated through.
        internal: a part of another op's reference, without a kernel.
    """
    name = schema.split("(", 1)[0]
    _declarations.define(schema)
    _declarations.impl(name, reference, "CompositeExplicitAutograd")
    if not internal:
        _op_names.append(name)


def refuse_second_derivative(op: str) -> None:
    """Make a second derivative of an op an error; torch would return zero."""

    def refuse(ctx: object, *grads: object) -> None:
        raise RuntimeError(
            f"{op} has no second derivative; ops.fused=false (swin_moe.ops.use_references) has one"
        )

    torch.library.register_autograd(f"swin_moe::{op}_backward", refuse)


def load(folder: Path = PACKAGE) -> bool:
    """Load ``_C*.so`` from a folder; warn if it cannot be loaded.

    Returns:
        whether it was loaded; without it every op runs its reference.
    """
    paths = sorted(folder.glob("_C*.so"))
    problem = "" if paths else "not built"
    try:
        for path in paths:
            torch.ops.load_library(path)
    except (ImportError, OSError) as error:
        problem = f"not loadable ({reason(error)})"
    if problem:
        logger.warning("compiled ops %s, slow references are used: %s", problem, BUILD_HINT)
    else:
        logger.debug("compiled ops: %s", ", ".join(op_names()))
    return not problem


def library_digest(folder: Path = PACKAGE) -> str:
    """Return twelve hexadecimal digits of the library's hash, empty if it was not built."""
    paths = sorted(folder.glob("_C*.so"))
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:12] if paths else ""


def op_names() -> list[str]:
    """Return the names of the ops that may have kernels, without their backward passes."""
    return [name for name in _op_names if not name.endswith("_backward")]


@lru_cache  # used in every call of an op; the dispatcher takes 16 µs
def compiled_for(op: str, device_type: str) -> bool:
    """Return whether an op, and its backward if it has one, is compiled for a kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    names = [name for name in (op, f"{op}_backward") if name in _op_names]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(names) and all(has_kernel(f"swin_moe::{name}", key) for name in names)


def has_amx() -> bool:
    """Return whether the CPU attention kernels may have a form for AMX tiles here."""
    return (
        compiled_for("window_attention", "cpu")
        and torch.cpu._is_amx_tile_supported()
        and cpu_instruction_set(torch.bfloat16) in ("avx512_bf16", "amx_bf16")
    )


def allow_amx(allowed: bool) -> None:
    """Let bf16 attention on a CPU use AMX tiles, from the next call on."""
    torch.ops.swin_moe.allow_amx(allowed)


def cpu_instruction_set(dtype: torch.dtype) -> str | None:
    """Return the instruction set of the CPU attention kernels for a dtype, None without them."""
    if not compiled_for("window_attention", "cpu") or dtype not in KERNEL_DTYPES["cpu"]:
        return None
    return torch.ops.swin_moe.cpu_instruction_set(dtype == torch.bfloat16)
