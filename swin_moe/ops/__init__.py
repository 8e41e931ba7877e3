"""Compiled ops for routing, experts, window attention and AdamW, each with its PyTorch reference.

One file per op has its schema, fake implementation and autograd; large references have a file of
their own. Importing this package loads the compiled library if it was built, and `status` returns
what each op runs on.
"""

import torch

from . import _library
from ._library import (
    allow_unverified,
    assume_fused,
    cpu_instruction_set,
    library_digest,
    require_fused,
    status,
    use_references,
)
from .adamw import AdamwFactors, adamw_, adamw_reference_
from .leaving import fixed, is_leaving, of_one_size, sides
from .moe_choose import moe_choose
from .moe_dispatch import moe_combine, moe_combine_reference, moe_dispatch, moe_dispatch_reference
from .moe_experts import moe_experts, moe_experts_reference
from .moe_route import moe_route
from .route_reference import Route, RouteOptions, finite_range, moe_route_reference
from .window_attention import window_attention

# The discrete part of a route; activation checkpointing keeps their results.
ROUTING_OPS = [
    getattr(torch.ops.swin_moe, name).default
    for name in ("moe_assign", "moe_choose", "moe_route")
    if hasattr(torch.ops.swin_moe, name)
]

__all__ = [
    "ROUTING_OPS",
    "AdamwFactors",
    "Route",
    "RouteOptions",
    "adamw_",
    "adamw_reference_",
    "allow_unverified",
    "assume_fused",
    "cpu_instruction_set",
    "finite_range",
    "fixed",
    "is_leaving",
    "library_digest",
    "moe_choose",
    "moe_combine",
    "moe_combine_reference",
    "moe_dispatch",
    "moe_dispatch_reference",
    "moe_experts",
    "moe_experts_reference",
    "moe_route",
    "moe_route_reference",
    "of_one_size",
    "require_fused",
    "sides",
    "status",
    "use_references",
    "window_attention",
]

_library.load()  # after all ops are declared, so that its log line names them
