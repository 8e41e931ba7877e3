"""The Swin family as modules: a backbone, its feature maps, and SimMIM.

``swin.py`` has the backbone and the table of the differences between V1, V2, SwinMLP and Swin-MoE.
``build.py`` builds a model from config sections; ``swin_moe.build_model`` builds it by its name.
"""

from typing import Any

from .backbone import SwinFeatures
from .build import build, expert_parameter_names
from .outputs import Outputs
from .simmim import SimMIM
from .swin import SwinTransformer

__all__ = [
    "Outputs",
    "SimMIM",
    "SwinFeatures",
    "SwinTransformer",
    "build",
    "expert_parameter_names",
]


def __getattr__(name: str) -> Any:
    """Say where a former name of this module is now."""
    if name in ("build_features", "build_model", "list_models"):
        raise ImportError(f"swin_moe.models.{name} has moved: from swin_moe import {name}")
    if name in ("MoEOutput", "split_output"):
        raise ImportError(
            f"swin_moe.models.{name} is gone: every model returns "
            "swin_moe.models.Outputs(predictions, aux_loss, routing)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
