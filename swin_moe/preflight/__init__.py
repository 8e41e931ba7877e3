"""What can be known before the first step: are all processes alike, and how do they connect."""

from .agreement import Agreement, agree
from .start import at_start, refuse

__all__ = ["Agreement", "agree", "at_start", "refuse"]
