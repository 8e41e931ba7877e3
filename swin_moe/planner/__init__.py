"""What a run takes, before it is started: memory, messages, time, and which layouts fit."""

from .command import DoesNotFit, plan
from .hardware import NAMES, Cluster

__all__ = ["NAMES", "Cluster", "DoesNotFit", "plan"]
