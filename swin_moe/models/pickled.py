"""``.pth`` files, read by torch's weights-only unpickler with a list of harmless classes.

Some files carry their configuration or a scaler's state beside the weights, which become plain
dicts.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]

# Where programs keep the weights in what they save, the most telling name first.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "model_ema", "state_dict_ema")


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message is one line for the user."""


class _PlainDict:
    """What a pickled configuration object becomes: its items, with none of its code."""

    def __new__(cls) -> Any:
        return OrderedDict()  # of the mappings that the unpickler fills, the one with attributes


_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # its module changed its name in numpy 2
_ALLOWED: list[Any] = [
    (_PlainDict, "yacs.config.CfgNode"),  # official files
    (_PlainDict, "argparse.Namespace"),  # DeiT-style and timm training files
    # DeepSpeed's
    (_PlainDict, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_PlainDict, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_PlainDict, "deepspeed.utils.tensor_fragment.fragment_address"),
    # numpy numbers, such as the best accuracy
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
]


def load_pickled(path: Path) -> Any:
    """The content of a ``.pth``; objects of other than harmless classes are refused.

    Raises:
        WeightsError: the file is missing, damaged, or could run code.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global:?|class) '?([\w.]+\.[\w.]+)", str(error))
        what = f"a Python object ({found[1]})" if found else "more than weights"
        raise WeightsError(
            f"{path}: holds {what}; loading that could run code, so it is refused. If you trust "
            "the file, open it with torch.load(file, weights_only=False) and torch.save only its "
            "dictionary of weights"
        ) from None
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        told = isinstance(error, RuntimeError | OSError) and str(error)
        first = (told or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path}: truncated or not a PyTorch file ({first:.100})") from None


def read_pickled(path: Path) -> State:
    """The weights in a ``.pth``, wherever in it they are.

    Raises:
        WeightsError: there are none, or the file cannot be used.
    """
    return _unwrap(load_pickled(path), path)


def _is_zip(path: Path) -> bool:
    return zipfile.is_zipfile(path)


def _unwrap(content: Any, path: Path) -> State:
    candidates = [content]
    if isinstance(content, dict):
        held = [content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)]
        inner = [part.get("state_dict") for part in held]
        candidates = [*held, *inner, content]
    for candidate in candidates:
        if isinstance(candidate, dict):
            state = {name: t for name, t in candidate.items() if isinstance(t, Tensor)}
            if state:
                return state
    raise WeightsError(f"{path}: no weights found (looked for {', '.join(_WRAPPERS)})")
