"""Tutel as a backend: its moe_layer exchanges the tokens, with our router and experts inside.

Tutel (https://github.com/microsoft/tutel, MIT) is not in the package index: users install it from
its repository. It shares our parameters, plan, losses and statistics, so that checkpoints do not
depend on the backend. This module works around these properties of its moe_layer:

- it pops keys from the dicts that it gets, so it gets dicts of its own;
- its own experts need an ``activation_fn``: ours replace them;
- it ignores ``forward(capacity_factor=0)``: the factor is set on the gate before each call;
- with batch-prioritised order and no capacity it drops tokens: the order, which has no effect
  there, is off;
- unequal tokens per rank need ``inequivalent_tokens``, which dropless calls set;
- its balance loss is attached to the output, and its counts are wrong with batch-prioritised
  order: loss and counts come from our plan of the same logits;
- expert gradients are sums over the ranks' losses, as in our layer; the engine averages them;
- it caches kernels per device and not per dtype, and non-finite tokens spread to others.

A self-check (``CHECKS``) compares it with our layer before the first use, in cases that show these
faults, so that a changed version of Tutel raises an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..distributed import Group
from ..ops import is_leaving
from .layer import MoELayer, MoEResult
from .plan import RoutingPlan

INSTALL_HINT = (
    "moe.backend=tutel needs Tutel, which is not installed: pip install --no-build-isolation "
    "git+https://github.com/microsoft/tutel (NO_CUDA=1 without a GPU), or use moe.backend=fused"
)
_checked: set[tuple[int, str]] = set()  # group size and device of the layers that passed


class Check(NamedTuple):
    """One small layer of the self-check; outputs and all gradients must equal ours.

    Attributes:
        covers: the known fault of Tutel that it shows, for the message.
        more_tokens: tokens that each rank has in addition to those of the rank before.
    """

    covers: str
    factor: float
    top_k: int
    dtype: torch.dtype = torch.float32
    more_tokens: int = 0


CHECKS = (
    Check("capacity and order, or the scale of the experts' gradients", 1.0, 1),
    Check("the second choice's place in the queue", 1.0, 2),
    Check("dropless routing", 0.0, 2),
    Check("unequal numbers of tokens per rank", 0.0, 1, more_tokens=3),
    Check("kernels of another dtype", 1.0, 1, torch.bfloat16),
    Check("kernels of another dtype, back again", 1.0, 1),
)


class _Gate(nn.Module):
    """A gate for Tutel that returns the logits of our router."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate_noise = 0.0  # the logits contain our noise
        self.capacity_factor = 0.0
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.logits is not None
        return self.logits


class _ExpertsView(nn.Module):
    """Our experts with the signature that Tutel calls."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.inner = experts

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        used = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
        return self.inner(rows, used, x.shape[1]).view(x.shape)


def _refuse_what_tutel_lacks(moe: MoEConfig, group: Group) -> None:
    lacking = {
        f"num_experts={moe.num_experts} over {group.size} ranks": moe.num_experts < group.size,
        f"overlap_degree={moe.overlap_degree}": moe.overlap_degree != 1,
        f"routing={moe.routing}": moe.routing != "token_choice",
        "score=sigmoid": moe.score == "sigmoid",
        "gate_after_norm": moe.gate_after_norm,
        "route_per_image": moe.route_per_image,
        "expert_bias_update_rate": moe.expert_bias_update_rate > 0,
        "eval_top_k": moe.eval_top_k not in (0, moe.top_k),
        "normalize_gate with top_k=1": moe.normalize_gate and moe.top_k == 1,
    }
    for setting, wanted in lacking.items():
        if wanted:
            raise ValueError(f"moe.backend=tutel has no moe.{setting}: use moe.backend=fused")


class TutelLayer(MoELayer):
    """A :class:`MoELayer` whose stages 3 to 5 are Tutel's.

    Raises:
        ValueError: Tutel is not installed, lacks a setting, or differs from our layer in results.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        moe: MoEConfig,
        group: Group | None = None,
        *,
        initialise: bool = True,
    ) -> None:
        super().__init__(dim, hidden_dim, moe, group, initialise=initialise)
        _refuse_what_tutel_lacks(moe, self.group)
        try:
            from tutel import moe as tutel_moe
        except ImportError:
            raise ValueError(INSTALL_HINT) from None
        self.gate_view = _Gate(moe.top_k)
        layer = tutel_moe.moe_layer(
            gate_type={"type": "custom", "module": lambda **_: self.gate_view},
            model_dim=dim,
            experts={
                "type": "custom",
                "module": lambda **_: _ExpertsView(self.experts),
                "num_experts_per_device": moe.num_experts // self.group.size,
            },
            group=self.group.handle,
            batch_prioritized_routing=moe.batch_prioritized,
            normalize_gate=moe.normalize_gate,
        )
        # In a tuple, so that our parameters are not registered again under Tutel's names.
        self._tutel = (layer,)

    def forward(self, x: Tensor) -> MoEResult:
        if is_leaving():
            raise ValueError(
                "moe.backend=tutel cannot be exported or traced: use moe.backend=fused"
            )
        self._self_check(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> MoEResult:
        moe, (layer,) = self.moe, self._tutel
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        noise = torch.randn_like(logits) if self.training and moe.gate_noise else None
        routing = self.route(tokens, noise=noise)
        if noise is not None:
            logits = logits + noise * (moe.gate_noise / moe.num_experts)
        assert isinstance(routing.plan, RoutingPlan)
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        # Tutel would spread a bad token: its input and output are set to 0.
        bad = ~logits.isfinite().all(1, keepdim=True)
        tokens = tokens.masked_fill(bad, 0.0)
        self.gate_view.logits = logits.masked_fill(bad, 0.0)
        self.gate_view.capacity_factor = factor
        layer.batch_prioritized_routing = moe.batch_prioritized and factor > 0
        output = layer(tokens, inequivalent_tokens=factor == 0)
        output = output.masked_fill(bad, 0.0)
        self.gate_view.logits = None
        if self.shared is not None:
            output = output + self.shared(tokens)
        return MoEResult(output.view_as(x).to(x.dtype), routing.aux_loss, routing.stats)

    def _self_check(self, x: Tensor) -> None:
        """Compare small layers with ours, once per group size and device; collective."""
        key = (self.group.size, x.device.type)
        if key in _checked:
            return
        _checked.add(key)
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
            for check in CHECKS:
                self._compare(check, x.device)

    def _compare(self, check: Check, device: torch.device) -> None:
        torch.manual_seed(1 + self.group.rank)
        changes = {"top_k": check.top_k, "capacity_factor": check.factor, "gate_noise": 0.0}
        changes["normalize_gate"] = self.moe.normalize_gate and check.top_k > 1
        changes |= {"drop_rate": 0.0, "num_shared_experts": 0}
        moe = self.moe.model_copy(update={**changes, "balance": "gshard"})
        theirs = TutelLayer(8, 16, moe, self.group).to(device, check.dtype)
        ours = MoELayer(8, 16, moe, self.group).to(device, check.dtype)
        theirs.experts.reset_parameters(0.5)
        ours.load_state_dict(theirs.state_dict())
        count = 6 * moe.num_experts + check.more_tokens * self.group.rank
        tokens = torch.randn(count, 8, device=device).to(check.dtype)
        results = []
        for layer in (theirs, ours):
            leaf = tokens.clone().requires_grad_()
            call = layer._forward if isinstance(layer, TutelLayer) else layer
            output = call(leaf).output
            output.square().sum().backward()
            grads = [p.grad for p in layer.parameters()]
            results.append([output, leaf.grad, *grads])
        tolerance = 1e-3 if check.dtype == torch.float32 else 1e-1
        for theirs_value, our_value in zip(*results, strict=True):
            if not torch.allclose(theirs_value, our_value, rtol=tolerance, atol=tolerance):
                raise ValueError(
                    f"moe.backend=tutel: this version of Tutel computes otherwise ({check.covers}, "
                    f"top-{check.top_k}, {check.dtype}); use moe.backend=fused"
                )
