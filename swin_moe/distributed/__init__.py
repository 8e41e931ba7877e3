"""Process groups, collectives, the store where ranks meet, and the watch over hangs.

``world.py`` starts torch.distributed and makes the expert groups, after ``meeting.py`` and
``stores.py`` have brought the ranks together; ``numa.py`` keeps a rank near its GPU.
``watchdog.py`` ends a rank that hangs, by the work that ``work_meter.py`` measures.
``expert_placement.py`` computes which rank holds which expert.
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
        make_deterministic,
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
    "make_deterministic",
    "rng_state",
    "seed_everything",
    "set_rng_state",
    "shutdown",
]

# Deferred: the modules that count ranks and experts need no torch.
__getattr__ = exports(__name__, dict.fromkeys(__all__, "world"))
