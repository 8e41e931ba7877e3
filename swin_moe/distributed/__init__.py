"""What ranks share: groups, collectives, the store where they meet, and the watch over hangs.

``world.py`` starts torch.distributed and makes the groups of experts. ``meeting.py`` and
``stores.py`` bring the ranks together before that. ``watchdog.py`` ends a rank that hangs, and
``expert_placement.py`` says which rank holds which expert.
"""

from typing import TYPE_CHECKING

from ..common.deferred import exports

if TYPE_CHECKING:
    from .world import (
        PATIENCE,
        Group,
        World,
        all_reduce_,
        backend,
        barrier,
        broadcast_object,
        connect,
        gather_objects,
        init,
        rng_state,
        seed_everything,
        set_rng_state,
        shutdown,
    )

__all__ = [
    "PATIENCE",
    "Group",
    "World",
    "all_reduce_",
    "backend",
    "barrier",
    "broadcast_object",
    "connect",
    "gather_objects",
    "init",
    "rng_state",
    "seed_everything",
    "set_rng_state",
    "shutdown",
]

# Ranks and experts are counted without torch.
__getattr__ = exports(__name__, dict.fromkeys(__all__, "world"))
