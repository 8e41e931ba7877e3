"""Train Swin Transformer V2 and its Mixture-of-Experts variant.

>>> import swin_moe
>>> model = swin_moe.build_model("swinv2_tiny_window8_256", num_classes=10)
"""

from typing import TYPE_CHECKING

from .common.deferred import defer_packages, exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import load_config
    from .factory import build_features, build_model, list_models
    from .moe import MoELayer

__all__ = ["MoELayer", "build_features", "build_model", "list_models", "load_config"]

defer_packages()
__getattr__ = exports(
    __name__,
    {
        "build_features": "factory",
        "build_model": "factory",
        "list_models": "factory",
        "load_config": "config",
        "MoELayer": "moe",
    },
)
