"""The command ``swin-moe plan``: predicts memory, messages and time of a run, and ranks layouts.

``trace.py`` runs the model on tensors without data; ``flops.py``, ``states.py``, ``traffic.py``
and ``memory.py`` are formulas. ``choices.py`` ranks the layouts of a config by a roofline, and
``scaling.py`` scales one. ``command.py`` prints and ``draw.py`` draws.
"""

from ..common.hardware import NAMES, Cluster
from .command import DoesNotFit, plan

__all__ = ["NAMES", "Cluster", "DoesNotFit", "plan"]
