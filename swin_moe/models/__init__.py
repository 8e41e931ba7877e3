"""Swin V2 and its Mixture-of-Experts variant."""

from .build import build, build_model, expert_parameter_names, list_models, split_output
from .simmim import SimMIM
from .swin import MoEOutput, SwinTransformer

__all__ = [
    "MoEOutput",
    "SimMIM",
    "SwinTransformer",
    "build",
    "build_model",
    "expert_parameter_names",
    "list_models",
    "split_output",
]
