"""Compiled ops, each with its PyTorch reference; the dispatcher chooses.

One file per op: schema, fake implementation, autograd, reference. Importing this package loads
the compiled library if it was built; `status` says what each op runs on.
"""

import torch

from swin_moe.ops import _library
from swin_moe.ops._library import (
    allow_unverified,
    assume_fused,
    cpu_instruction_set,
    library_digest,
    require_fused,
    status,
    use_references,
)
from swin_moe.ops.leaving import fixed, is_leaving, of_one_size, sides
from swin_moe.ops.moe_choose import moe_choose
from swin_moe.ops.moe_dispatch import (
    moe_combine,
    moe_combine_reference,
    moe_dispatch,
    moe_dispatch_reference,
)
from swin_moe.ops.moe_experts import moe_experts, moe_experts_reference
from swin_moe.ops.moe_route import moe_route
from swin_moe.ops.route_reference import (
    Route,
    RouteOptions,
    finite_range,
    moe_route_reference,
)
from swin_moe.ops.window_attention import window_attention

# The discrete part of a route; activation checkpointing keeps what these return.
ROUTING_OPS = [
    getattr(torch.ops.swin_moe, name).default
    for name in ("moe_assign", "moe_choose", "moe_route")
    if hasattr(torch.ops.swin_moe, name)
]

__all__ = [
    "ROUTING_OPS",
    "Route",
    "RouteOptions",
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

_library.load()  # after the ops are declared, so that its log line names them all
