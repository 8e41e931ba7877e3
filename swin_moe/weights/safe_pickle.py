"""``.pth`` files, read by torch's weights-only unpickler with a list of harmless classes.

Some files also hold a configuration or a scaler's state, whose objects become plain dicts.
"""

from __future__ import annotations

import builtins
import pickle
import re
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.reading import openable
from ..common.text import plain
from .adapters import State
from .file_kind import WeightsError, check_zip, kind_of, unreadable

_LEVELS = 8  # of nested dictionaries, more than any program writes


class _PlainDict:
    """A stand-in for an object of another program: its items, without its code."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()  # the unpickler can fill its items and its attributes


# Their module changed its name in numpy 2.
_NUMPY_SCALAR, _NUMPY_ARRAY = np.float64(0).__reduce__()[0], np.ones(1).__reduce__()[0]
# Modules of the standard library whose objects programs save with weights; others are refused.
_HARMLESS = {"pathlib", "datetime", "collections", "types", "uuid", "decimal", "typing"}
_ALLOWED: list[Any] = [
    (_PlainDict, "yacs.config.CfgNode"),  # official files
    (_PlainDict, "argparse.Namespace"),  # DeiT-style and timm training files
    (_PlainDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (_PlainDict, "lightning.pytorch.utilities.parsing.AttributeDict"),
    (_PlainDict, "lightning.fabric.utilities.data.AttributeDict"),
    (_PlainDict, "mmengine.logging.history_buffer.HistoryBuffer"),
    # DeepSpeed's
    (_PlainDict, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_PlainDict, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_PlainDict, "deepspeed.utils.tensor_fragment.fragment_address"),
    # numpy numbers, such as the best accuracy, and arrays of them
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_ARRAY, "numpy.core.multiarray._reconstruct"),
    (_NUMPY_ARRAY, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in np.typecodes["All"].replace("O", "")),
]


def load_pickled(path: Path) -> Any:
    """Read a ``.pth``; make objects plain dicts, and refuse content that may run code.

    Raises:
        WeightsError: the file is missing, damaged, or could run code.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        raise WeightsError(f"{plain(path)} is a safetensors file: name it .safetensors")
    facts = check_zip(path) if kind == "zip" else None
    misnamed = path.suffix == ".safetensors"  # torch would trust the name
    mapped = facts is not None and not facts.compressed and not misnamed
    with torch.serialization.safe_globals(_ALLOWED):
        others = _other_programs_classes(path) if kind == "zip" else []
        try:
            with torch.serialization.safe_globals(others):
                content = _load(path, misnamed, mapped)
        except pickle.UnpicklingError as error:
            raise WeightsError(_refusal(path, error)) from None
        except Exception as error:  # a damaged file may raise anything
            raise WeightsError(unreadable(path, error)) from None
    if facts and mapped:
        _check_records(content, facts.sizes, path)
    return content


def _load(path: Path, misnamed: bool, mapped: bool) -> Any:
    with (
        path.open("rb") if misnamed else openable(path) as source,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about torch's checks of sparse tensors
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _refusal(path: Path, error: Exception) -> str:
    found = re.search(r"(?:GLOBAL|global:?|class) '?([\w.]+\.[\w.]+)", str(error))
    what = f"a Python object ({found[1]})" if found else "more than weights"
    return (
        f"{plain(path)}: holds {what}; loading that could run code, so it is refused. If you "
        "trust the file, open it with torch.load(file, weights_only=False) and torch.save only "
        "its dictionary of weights"
    )


def _other_programs_classes(path: Path) -> list[Any]:
    """Return stand-ins for the classes that a zip names, as in hyper-parameters.

    The classes themselves are neither imported nor called. Python's and PyTorch's own stay with the
    unpickler's list, which refuses harmful files.
    """
    try:
        with path.open("rb") as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the reader will report the damage
        return []
    return [(_PlainDict, name) for name in names if _is_harmless(name)]


def _is_harmless(name: str) -> bool:
    module, _, rest = name.partition(".")
    if module == "builtins":
        return isinstance(getattr(builtins, rest, None), type)
    # pickle may write Python 2's names of modules.
    pythons = {*sys.stdlib_module_names, *(old.partition(".")[0] for old in IMPORT_MAPPING)}
    return module in _HARMLESS or module not in pythons | {"torch"}


def _check_records(content: Any, sizes: set[int], path: Path) -> None:
    """Check the sizes of memory-mapped tensors, which torch does not.

    A tensor that claims more bytes than its record has would read from the next record.
    """
    for name, tensor in flatten(content).items():
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            held = tensor.untyped_storage().nbytes()
            if held and held not in sizes:
                raise WeightsError(
                    f"{plain(path)}: damaged: {plain(name)} claims {held:,} bytes, which no part "
                    "of the file has"
                )


def tensors_of(content: Any, path: Path) -> State:
    """Return all tensors of a result of :func:`load_pickled`; raise an error if it has none."""
    state = flatten(content)
    if not state:
        held = [plain(str(key)) for key in content] if isinstance(content, dict) else []
        what = f"it holds {', '.join(held[:6])}" if held else f"it is a {type(content).__name__}"
        raise WeightsError(f"{plain(path)}: no weights found: no tensors; {what}")
    return state


def flatten(content: Any) -> State:
    """Collect the tensors of nested dictionaries and lists under dotted names."""
    state: State = {}
    for name, tensor in _tensors(content, "", _LEVELS, set()):
        while name in state:  # a dot in a key made two names one
            name += "'"
        state[name] = tensor
    return state


def _tensors(
    content: Any, prefix: str, levels: int, seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix[:-1], content
    elif isinstance(content, (Mapping, list, tuple)) and levels and id(content) not in seen:
        seen.add(id(content))  # visits shared values once, and ends cycles
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from _tensors(value, f"{prefix}{key}.", levels - 1, seen)
