"""Checks of the processes of a run before its first step.

``agreement.py`` compares the facts of all processes, which ``facts.py`` collects. ``links.py``
times their collectives, and ``shared.py`` checks their file systems. ``start.py`` makes all checks
at the start of a training, and ``doctor.py`` for the command.
"""

from .agreement import Agreement, agree
from .start import at_start, refuse

__all__ = ["Agreement", "agree", "at_start", "refuse"]
