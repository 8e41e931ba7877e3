"""The compute dtype, and a forward pass in it without DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..config import Config, PrecisionConfig
from ..distributed import make_deterministic
from ..models import Outputs
from ..tasks.base import Forward

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_computes_in_bf16() -> bool:
    """Return whether this processor has bf16 instructions: AVX512-BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """Return the compute dtype.

    ``auto`` is bf16 if the device has instructions for it, otherwise fp16 on a GPU with tensor
    cores (compute capability 7.0), otherwise fp32.

    Raises:
        ValueError: the config states a dtype that the device lacks.
    """
    if precision.dtype == "fp32":
        return torch.float32
    if device.type == "cuda":
        return _resolve_on_gpu(precision.dtype, device)
    if precision.dtype == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ValueError(
            "precision.dtype=fp16: this CPU has no fp16; use precision.dtype=bf16 or fp32"
        )
    if precision.dtype == "auto":
        return torch.bfloat16 if cpu_computes_in_bf16() else torch.float32
    return DTYPES[precision.dtype]


def _resolve_on_gpu(wanted: str, device: torch.device) -> torch.dtype:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    tensor_cores = torch.cuda.get_device_capability(device) >= (7, 0)
    if wanted == "bf16" and not has_bf16:
        other = "fp16" if tensor_cores else "fp32"
        raise ValueError(f"precision.dtype=bf16: this GPU has no bf16; use precision.dtype={other}")
    if wanted == "auto":
        wanted = "bf16" if has_bf16 else "fp16" if tensor_cores else "fp32"
    return DTYPES[wanted]


def set_numerics(config: Config, device: torch.device) -> None:
    """Set PyTorch's global switches: denormals, TF32 and deterministic algorithms.

    TF32 serves fp32 runs on a GPU; :func:`~swin_moe.common.wide.exact_linear` never uses it.
    Without ``precision.tf32`` cuDNN's convolutions do not use it either, unlike PyTorch's default.
    """
    torch.set_flush_denormal(config.precision.flush_denormals)
    if device.type == "cuda":
        dtype = resolve_precision(config.precision, device)
        tf32 = config.precision.tf32 and dtype == torch.float32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    if config.train.deterministic:
        make_deterministic()


def cast_floating(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the floating-point inputs to ``dtype``; masks and indices stay."""
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def predictions_in_fp32(outputs: Outputs) -> Outputs:
    """Cast the predictions to fp32, for the loss."""
    return outputs._replace(predictions=tree_map(Tensor.float, outputs.predictions))


def in_precision(model: nn.Module, dtype: torch.dtype, cast_weights: bool) -> Forward:
    """Wrap a model so that it computes as in the engine, with low-precision weights or autocast."""
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
