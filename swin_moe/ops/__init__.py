"""Compiled ops for routing, experts, window attention and AdamW, each with its PyTorch reference.

One file per op has its schema, fake implementation and autograd; large references have a file of
their own. Importing this package loads the compiled library if it was built. ``choice.py`` decides
which kernels run, by the trials of ``trial/``.
"""

import torch

from . import _library
from ._library import cpu_instruction_set, library_digest
from .adamw import AdamwFactors, adamw_, adamw_reference_
from .choice import (
    assume_fused,
    choices,
    decide,
    describe,
    require_fused,
    set_choices,
    signature,
    status,
    trust_kernels,
    use_references,
)
from .leaving import fixed, is_leaving, of_one_size, sides
from .moe_choose import moe_choose
from .moe_dispatch import moe_combine, moe_combine_reference, moe_dispatch, moe_dispatch_reference
from .moe_experts import moe_experts, moe_experts_reference
from .moe_route import MAX_CUDA_EXPERTS, moe_route
from .route_reference import Route, RouteOptions, finite_range, moe_route_reference
from .signature import Choice, Signature
from .window_attention import (
    KERNEL_HEAD_DIMS,
    MAX_KERNEL_TOKENS,
    has_instance,
    window_attention,
)

# The discrete part of a route; activation checkpointing keeps their results.
ROUTING_OPS = [
    getattr(torch.ops.swin_moe, name).default
    for name in ("moe_assign", "moe_choose", "moe_route")
    if hasattr(torch.ops.swin_moe, name)
]

__all__ = [
    "KERNEL_HEAD_DIMS",
    "MAX_CUDA_EXPERTS",
    "MAX_KERNEL_TOKENS",
    "ROUTING_OPS",
    "AdamwFactors",
    "Choice",
    "Route",
    "RouteOptions",
    "Signature",
    "adamw_",
    "adamw_reference_",
    "assume_fused",
    "choices",
    "cpu_instruction_set",
    "decide",
    "describe",
    "finite_range",
    "fixed",
    "has_instance",
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
    "set_choices",
    "sides",
    "signature",
    "status",
    "trust_kernels",
    "use_references",
    "window_attention",
]

_library.load()  # after all ops are declared
