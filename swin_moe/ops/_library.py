"""The compiled library; only this module loads it and declares its ops."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..common.text import reason
from .leaving import is_leaving

logger = logging.getLogger("swin_moe")

BUILD_HINT = "build them with `pip install --no-build-isolation -e .`"
# Dtypes of each device's kernels. For others the reference runs, see `has_kernel`.
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

# GPU architectures (compute capabilities) on which an op's CUDA kernels have passed their tests.
# Elsewhere they are compiled, but off until `allow_unverified`.
VERIFIED: dict[str, set[tuple[int, int]]] = {}

PACKAGE = Path(__file__).parent.parent
_declarations = torch.library.Library("swin_moe", "FRAGMENT")
_op_names: list[str] = []
_unverified_allowed = False
_fused_wanted = True
_assumed: bool | None = None  # see `assume_fused`


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
    """Load ``_C*.so`` from a folder, and log in one line what the ops run on.

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
        logger.info("ops: %s", ", ".join(f"{op} {what}" for op, what in status().items()))
    return not problem


def library_digest(folder: Path = PACKAGE) -> str:
    """Return twelve hexadecimal digits of the library's hash, empty if it was not built."""
    paths = sorted(folder.glob("_C*.so"))
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:12] if paths else ""


def compiled_for(op: str, device_type: str) -> bool:
    """Return whether an op, and its backward if it has one, is compiled for a kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    names = [name for name in (op, f"{op}_backward") if name in _op_names]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(names) and all(has_kernel(f"swin_moe::{name}", key) for name in names)


def _trusted_on(op: str, device_type: str) -> bool:
    """Return whether kernels are enabled, and verified on this architecture or allowed anyway."""
    if not _fused_wanted:
        return False
    if device_type == "cpu" or _unverified_allowed:
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability() in VERIFIED.get(op, ())


def allow_unverified() -> None:
    """Use CUDA kernels also on architectures on which they have not been verified."""
    global _unverified_allowed
    _unverified_allowed = True


def use_references() -> None:
    """Run every op's PyTorch reference from now on, for example to rule out a kernel's error."""
    global _fused_wanted
    _fused_wanted = False


@contextmanager
def assume_fused(fused: bool) -> Iterator[None]:
    """Choose kernels, or references, regardless of the build, for tensors without data."""
    global _assumed
    before, _assumed = _assumed, fused
    try:
        yield
    finally:
        _assumed = before


def status() -> dict[str, str]:
    """Return for each op the devices on which it is fused, and why others are off.

    Values are ``"fused (cpu)"``, ``"fused (cpu, cuda)"`` or ``"reference"``; on a GPU without
    verified kernels, ``"; cuda compiled, not yet verified on this architecture: off"`` follows.
    """
    kinds = [kind for kind in KERNEL_DTYPES if kind == "cpu" or torch.cuda.is_available()]
    result = {}
    for op in _op_names:
        if op.endswith("_backward"):
            continue
        compiled = [kind for kind in kinds if compiled_for(op, kind)]
        fused = [kind for kind in compiled if _trusted_on(op, kind)]
        result[op] = f"fused ({', '.join(fused)})" if fused else "reference"
        if len(fused) < len(compiled) and _fused_wanted:
            result[op] += "; cuda compiled, not yet verified on this architecture: off"
    return result


def cpu_instruction_set(dtype: torch.dtype) -> str | None:
    """Return the instruction set of the CPU attention kernels for a dtype, None without them."""
    if not compiled_for("window_attention", "cpu") or dtype not in KERNEL_DTYPES["cpu"]:
        return None
    return torch.ops.swin_moe.cpu_instruction_set(dtype == torch.bfloat16)


def require_fused(device_type: str) -> None:
    """Raise an error unless every op runs its kernels on a kind of device.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: an op would run its reference there.
    """
    if device_type not in KERNEL_DTYPES:
        raise ValueError(f"ops: no kernels exist for device {device_type!r}, only for cpu and cuda")
    missing = [op for op in status() if not compiled_for(op, device_type)]
    if missing:
        raise ValueError(
            f"ops.require_fused: not compiled for {device_type}: {', '.join(missing)};"
            f" {BUILD_HINT}" + (" where nvcc is found" if device_type == "cuda" else "")
        )
    if not _fused_wanted:
        raise ValueError("ops.require_fused: ops.fused=false asks for the opposite")
    untrusted = [op for op in status() if not _trusted_on(op, device_type)]
    if untrusted:
        raise ValueError(
            f"ops.require_fused: not yet verified on this architecture: {', '.join(untrusted)};"
            " ops.allow_unverified=true uses them all the same"
        )


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Return whether a compiled kernel of an op may run on a tensor of this device and dtype."""
    kind = tensor.device.type
    return not is_leaving() and tensor.dtype in KERNEL_DTYPES.get(kind, ()) and _serves(op, kind)


def _serves(op: str, device_type: str) -> bool:
    if _assumed is not None:
        return _assumed
    return _decide(op, device_type, _fused_wanted, _unverified_allowed)


# A graph cannot query the dispatcher. This is torch.compiler.assume_constant_result, which would
# import torch._dynamo and add two seconds to each start.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache  # used in every call of an op; the dispatcher takes 16 µs
def _decide(op: str, device_type: str, wanted: bool, unverified: bool) -> bool:
    return compiled_for(op, device_type) and _trusted_on(op, device_type)
