"""``swin-moe inspect``: see which patches of real images each expert of a checkpoint takes."""

from .command import inspect_checkpoint

__all__ = ["inspect_checkpoint"]
