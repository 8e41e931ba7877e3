"""Train Swin Transformer V2 and its Mixture-of-Experts variant.

>>> import swin_moe
>>> model = swin_moe.build_model("swinv2_tiny_window8_256", num_classes=10)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import load_config
    from .models import build_model, list_models
    from .moe import MoELayer

_HOMES = {
    "build_model": "models",
    "list_models": "models",
    "load_config": "config",
    "MoELayer": "moe",
}
__all__ = ["MoELayer", "build_model", "list_models", "load_config"]


def __getattr__(name: str) -> Any:
    # On first use: `swin-moe --help` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'swin_moe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
