"""The Swin family: models by name, backbones for others, weights from anywhere."""

from .build import build, build_model, expert_parameter_names, list_models, split_output
from .features import SwinFeatures, build_features
from .simmim import SimMIM
from .swin import MoEOutput, SwinTransformer

__all__ = [
    "MoEOutput",
    "SimMIM",
    "SwinFeatures",
    "SwinTransformer",
    "build",
    "build_features",
    "build_model",
    "expert_parameter_names",
    "list_models",
    "split_output",
]
