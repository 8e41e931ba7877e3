"""The dtype to compute in, and a forward pass in it without DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..config import PrecisionConfig
from ..models import Outputs
from ..tasks.base import Forward


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


def cast_floating(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs with all floating-point tensors in ``dtype``; masks and indices stay."""
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def predictions_in_fp32(outputs: Outputs) -> Outputs:
    """Outputs whose predictions are fp32, for the loss."""
    return outputs._replace(predictions=tree_map(Tensor.float, outputs.predictions))


def in_precision(model: nn.Module, dtype: torch.dtype, cast_weights: bool) -> Forward:
    """Wrap a model so that it computes as under the engine: bf16 weights, or autocast."""
    if cast_weights and dtype != torch.float32:
        for parameter in model.parameters():  # buffers stay fp32, as under DeepSpeed
            parameter.data = parameter.data.to(dtype)

    def forward(inputs: dict[str, Tensor]) -> Outputs:
        device = next(iter(inputs.values())).device
        autocast = dtype != torch.float32 and not cast_weights
        with torch.autocast(device.type, dtype=dtype, enabled=autocast):
            outputs: Outputs = model(**(cast_floating(inputs, dtype) if cast_weights else inputs))
        return predictions_in_fp32(outputs)

    return forward
