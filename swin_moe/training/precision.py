"""The dtype to compute in, and a forward pass in it without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import PrecisionConfig


def cpu_computes_in_bf16() -> bool:
    """Whether this processor has bf16 instructions: AVX512-BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in; ``auto`` is bf16 where the device has instructions for it.

    Raises:
        ValueError: bf16 is asked for on a GPU without it.
    """
    if precision.dtype == "fp32":
        return torch.float32
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision.dtype == "bf16" and not supported:
            raise ValueError("precision.dtype=bf16: this GPU has no bf16; use precision.dtype=fp32")
    else:
        supported = cpu_computes_in_bf16()
    wanted = precision.dtype == "bf16" or supported
    return torch.bfloat16 if wanted else torch.float32


def in_precision(model: nn.Module, dtype: torch.dtype, cast_weights: bool) -> Callable[..., Any]:
    """Wrap a model so that it computes as under the engine: bf16 weights, or autocast."""
    if dtype == torch.float32:
        return model
    if cast_weights:  # parameters only: buffers stay fp32, as under DeepSpeed
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return lambda images: model(images.to(dtype))

    def autocast(images: torch.Tensor) -> Any:
        with torch.autocast(images.device.type, dtype=dtype):
            return model(images)

    return autocast
