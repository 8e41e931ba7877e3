"""The command ``swin-moe inspect``: draws which patches of real images each expert takes.

``routes.py`` records the routes of the MoE layers and adds them up. ``command.py`` runs a
checkpoint over images and prints tables, and ``draw.py`` draws the pictures.
"""

from .command import inspect_checkpoint

__all__ = ["inspect_checkpoint"]
