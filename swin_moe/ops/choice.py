"""Kernel or fallback: the choice for each op, device, dtype and shape.

A kernel runs on a machine only after a trial there has found it right, and not slower than its
fallback, see ``trial/``. The first call of an op makes the trial, in a process of its own, and the
result is kept for all later runs on the machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from . import _library
from ._library import KERNEL_DTYPES, compiled_for
from .leaving import is_leaving
from .signature import Choice, Signature
from .trial import try_kernels

log = logging.getLogger("swin_moe")


# The attention kernels for AMX tiles, which are tried in addition to those for AVX-512.
AMX = Signature("window_attention_amx", "cpu", "bfloat16")
FP32_ONLY = ("adamw_", "moe_route")
_wanted, _required, _trusted = True, False, False
_assumed: bool | None = None
_choices: dict[Signature, Choice] = {}


def use_references() -> None:
    """Run every op's PyTorch reference from now on, for example to rule out a kernel's error."""
    global _wanted
    _wanted = False


def kernels_wanted() -> bool:
    """Return whether :func:`use_references` was not called."""
    return _wanted


def trust_kernels() -> None:
    """Run kernels without a trial from now on: for the trial itself, and for tests of kernels."""
    global _trusted
    _trusted = True


def require_fused(device_type: str) -> None:
    """Make every later call run its kernel on a kind of device, or raise an error.

    A kernel that is right but slower than its fallback runs, too.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: an op has no kernel there, or kernels are turned off.
    """
    global _required
    if device_type not in KERNEL_DTYPES:
        raise ValueError(f"ops: no kernels exist for device {device_type!r}, only for cpu and cuda")
    missing = [op for op in _library.op_names() if not compiled_for(op, device_type)]
    if missing:
        raise ValueError(
            f"ops.require_fused: not compiled for {device_type}: {', '.join(missing)};"
            f" {_library.BUILD_HINT}" + (" where nvcc is found" if device_type == "cuda" else "")
        )
    if not _wanted:
        raise ValueError("ops.require_fused: ops.fused=false asks for the opposite")
    _required = True


@contextmanager
def assume_fused(fused: bool) -> Iterator[None]:
    """Choose kernels, or references, regardless of build and trials."""
    global _assumed
    before, _assumed = _assumed, fused
    try:
        yield
    finally:
        _assumed = before


def status() -> dict[str, str]:
    """Return for each op the kinds of device with a compiled kernel.

    Values are such as ``"compiled (cpu, cuda)"``, or ``"reference"`` if there is none or kernels
    are turned off.
    """
    kinds = [kind for kind in KERNEL_DTYPES if kind == "cpu" or torch.cuda.is_available()]
    result = {}
    for op in _library.op_names():
        compiled = [kind for kind in kinds if _wanted and compiled_for(op, kind)]
        result[op] = f"compiled ({', '.join(compiled)})" if compiled else "reference"
    return result


@lru_cache  # each call of an op needs it
def signature(op: str, device: str, dtype: torch.dtype, *shape: int) -> Signature:
    """Return the signature of a call."""
    return Signature(op, device, str(dtype).rpartition(".")[2], shape if device == "cuda" else ())


def uses_kernel(op: str, tensor: Tensor, *shape: int) -> bool:
    """Return whether a call runs its kernel; make the trial first if there has been none.

    Args:
        tensor: its device and dtype are those of the call.
        shape: the sizes that select a CUDA kernel's instance.
    """
    kind = tensor.device.type
    # A plan for a GPU is traced on a CPU, and assumes a GPU's kernels.
    dtypes = KERNEL_DTYPES.get(kind if _assumed is None else "cuda", ())
    if is_leaving() or tensor.dtype not in dtypes:
        return False
    return _serves(op, kind, tensor.dtype, *(shape if kind == "cuda" else ()))


def _serves(op: str, kind: str, dtype: torch.dtype, *shape: int) -> bool:
    if _assumed is not None:
        return _assumed
    if not (_wanted and compiled_for(op, kind)):
        return False
    if _trusted:
        return True
    key = signature(op, kind, dtype, *shape)
    if key not in _choices:
        decide([key, *_companions(key)], log.warning)
    choice = _choices[key]
    _check_required(key, choice)
    return choice.right if _required else choice.fused


def _companions(key: Signature) -> list[Signature]:
    """Return signatures that a model with this one has as well: one process tries them all."""
    return [
        Signature(op, key.device, "float32" if op in FP32_ONLY else key.dtype)
        for op in _library.op_names()
        if op != "adamw_" and (op != "window_attention" or key.device == "cpu")
    ]


def _check_required(key: Signature, choice: Choice) -> None:
    if _required and not choice.right and key != AMX:  # without tiles, other kernels run
        raise ValueError(f"ops.require_fused: {key}: {choice}")


# A graph cannot query the dispatcher. This is torch.compiler.assume_constant_result, which would
# import torch._dynamo and add two seconds to each start.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def decide(
    signatures: Iterable[Signature], say: Callable[[str], None] = log.info
) -> dict[Signature, Choice]:
    """Choose for signatures, by trials of those that this machine has not seen.

    Args:
        say: reports that trials begin and end.

    Returns:
        their choices, without those that have no kernel to try.
    """
    wanted = [s for s in _with_amx(signatures) if _wanted and compiled_for(_op(s), s.device)]
    missing = [s for s in wanted if s not in _choices]
    for key, choice in (try_kernels(missing, say) if missing and not _trusted else {}).items():
        _choices.setdefault(key, choice)
        if not choice.fused:
            log.warning("%s: %s", key, choice)
        if key == AMX and choice.fused:
            _library.allow_amx(True)
    return {key: _choices[key] for key in wanted if key in _choices}


def _with_amx(signatures: Iterable[Signature]) -> list[Signature]:
    """Return signatures once each, with that of AMX if it concerns bf16 attention here."""
    found = list(dict.fromkeys(signatures))
    if AMX._replace(op="window_attention") in found and _library.has_amx():
        found.append(AMX)
    return found


def _op(key: Signature) -> str:
    return "window_attention" if key == AMX else key.op


def choices(device: str) -> dict[Signature, Choice]:
    """Return the choices made so far for a kind of device; none if references were wanted."""
    return {key: choice for key, choice in _choices.items() if _wanted and key.device == device}


def set_choices(choices: dict[Signature, Choice]) -> None:
    """Replace choices, for example by those on which all ranks agree.

    Raises:
        ValueError: a kernel is required and is not right.
    """
    _choices.update(choices)
    if AMX in choices:
        _library.allow_amx(choices[AMX].fused)
    for key, choice in choices.items():
        _check_required(key, choice)


def describe(choices: dict[Signature, Choice]) -> str:
    """Return choices in one line: "window_attention: fused, 2.1–2.9× the fallback; …"."""
    parts = []
    for op in dict.fromkeys(key.op for key in choices):
        mine = {key: choice for key, choice in choices.items() if key.op == op}
        fused = [choice.speedup for choice in mine.values() if choice.fused]
        rates = sorted({f"{rate:.1f}" for rate in fused if rate}, key=float)
        if len(fused) == len(mine):
            several = f"{rates[0]}–{rates[-1]}" if len(rates) > 1 else "".join(rates)
            parts.append(f"{op}: fused" + f", {several}× the fallback" * bool(rates))
        elif not fused and len({choice.reason for choice in mine.values()}) == 1:
            parts.append(f"{op}: {next(iter(mine.values()))}")
        else:
            parts += [f"{key}: {choice}" for key, choice in mine.items()]
    return "; ".join(parts)
