"""What a run takes, before it is started: memory, messages, time, and which layouts fit."""

from ..common.hardware import NAMES, Cluster
from .command import DoesNotFit, plan

__all__ = ["NAMES", "Cluster", "DoesNotFit", "plan"]
