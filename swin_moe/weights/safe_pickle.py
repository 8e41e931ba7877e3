"""``.pth`` files, read by torch's weights-only unpickler with a list of harmless classes.

Some files carry their configuration or a scaler's state beside the weights, which become plain
dicts.
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

_LEVELS = 8  # of dictionaries within each other; no program needs as many


class _PlainDict:
    """What an object of another program becomes: its items, with none of its code."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()  # of the mappings that the unpickler fills, the one with attributes


# Their module changed its name in numpy 2.
_NUMPY_SCALAR, _NUMPY_ARRAY = np.float64(0).__reduce__()[0], np.ones(1).__reduce__()[0]
# Modules of Python's own whose objects programs keep beside weights. What else is Python's own has
# no business there.
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
    """The content of a ``.pth``; objects become plain dicts, and what may run code is refused.

    Raises:
        WeightsError: the file is missing, damaged, or could run code.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        raise WeightsError(f"{plain(path)} is a safetensors file: name it .safetensors")
    facts = check_zip(path) if kind == "zip" else None
    misnamed = path.suffix == ".safetensors"  # torch would go by the name
    mapped = facts is not None and not facts.compressed and not misnamed
    with torch.serialization.safe_globals(_ALLOWED):
        others = _other_programs_classes(path) if kind == "zip" else []
        try:
            with torch.serialization.safe_globals(others):
                content = _load(path, misnamed, mapped)
        except pickle.UnpicklingError as error:
            raise WeightsError(_refusal(path, error)) from None
        except Exception as error:  # whatever a damaged file makes the reader stumble over
            raise WeightsError(unreadable(path, error)) from None
    if facts and mapped:
        _check_records(content, facts.sizes, path)
    return content


def _load(path: Path, misnamed: bool, mapped: bool) -> Any:
    with (
        path.open("rb") if misnamed else openable(path) as source,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # on how torch checks sparse tensors
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
    """Stand-ins for classes that a zip names beside its weights, as in hyper-parameters.

    The classes themselves are neither imported nor called. What remains of Python and PyTorch is
    left to the unpickler's list, so that a file that means harm is refused.
    """
    try:
        with path.open("rb") as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # a damaged file's reader will tell
        return []
    return [(_PlainDict, name) for name in names if _is_harmless(name)]


def _is_harmless(name: str) -> bool:
    module, _, rest = name.partition(".")
    if module == "builtins":
        return isinstance(getattr(builtins, rest, None), type)
    # pickle writes some modules by their names in Python 2.
    pythons = {*sys.stdlib_module_names, *(old.partition(".")[0] for old in IMPORT_MAPPING)}
    return module in _HARMLESS or module not in pythons | {"torch"}


def _check_records(content: Any, sizes: set[int], path: Path) -> None:
    """Check memory-mapped tensors, which torch does not: a tensor that claims more bytes than its
    record has would be read from its neighbour's."""
    for name, tensor in flatten(content).items():
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            held = tensor.untyped_storage().nbytes()
            if held and held not in sizes:
                raise WeightsError(
                    f"{plain(path)}: damaged: {plain(name)} claims {held:,} bytes, which no part "
                    "of the file has"
                )


def read_pickled(path: Path) -> State:
    """All tensors in a ``.pth``, see :func:`flatten`.

    Raises:
        WeightsError: there are none, or the file cannot be used.
    """
    return tensors_of(load_pickled(path), path)


def tensors_of(content: Any, path: Path) -> State:
    """The same of what :func:`load_pickled` returned."""
    state = flatten(content)
    if not state:
        held = [plain(str(key)) for key in content] if isinstance(content, dict) else []
        what = f"it holds {', '.join(held[:6])}" if held else f"it is a {type(content).__name__}"
        raise WeightsError(f"{plain(path)}: no weights found: no tensors; {what}")
    return state


def flatten(content: Any) -> State:
    """Tensors in dictionaries and lists within each other, under dotted names."""
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
        seen.add(id(content))  # shared values count once, and a cycle ends
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from _tensors(value, f"{prefix}{key}.", levels - 1, seen)
