"""Peers that compute a Mixture-of-Experts feed-forward layer, all with the same weights.

Every peer is called as its users would at best, without noise and without random dropping where it
can be had. A peer maps tokens [T, D] to the output [T, D] and the balance loss.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.distributed import World

Result = tuple[Tensor, Tensor]


class Spec(NamedTuple):
    """One cell: the tokens of all processes together, width D (hidden 4·D), and the routing."""

    tokens: int
    dim: int
    experts: int
    top_k: int
    dtype: torch.dtype
    capacity_factor: float = 1.25

    @property
    def hidden(self) -> int:
        return 4 * self.dim


class Weights(NamedTuple):
    """The weights: router [E, D], fc1 [E, H, D], bias1 [E, H], fc2 [E, D, H], bias2 [E, D]."""

    router: Tensor
    fc1: Tensor
    bias1: Tensor
    fc2: Tensor
    bias2: Tensor

    def local(self, world: World) -> Weights:
        """Return the weights of this rank: its experts, and the router."""
        rank, size = world.expert.rank, world.expert.size
        return Weights(self.router, *(t.chunk(size)[rank] for t in self[1:]))


Builder = Callable[[Spec, Weights, World], nn.Module]


def random_weights(spec: Spec, device: torch.device, std: float = 0.02) -> Weights:
    """Return normal weights and biases in the cell's dtype, the same on every rank."""
    E, D, H = spec.experts, spec.dim, spec.hidden
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((E, D), (E, H, D), (E, H), (E, D, H), (E, D))
    drawn = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return Weights(*((std * t).to(spec.dtype) for t in drawn))


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def expert_modules(weights: Weights) -> nn.ModuleList:
    """One feed-forward per expert, as most layers keep them."""
    experts = nn.ModuleList()
    for fc1, bias1, fc2, bias2 in zip(*weights[1:], strict=True):
        expert = feed_forward(fc1.shape[1], fc1.shape[0]).to(fc1)
        _copy(tuple(expert.parameters()), (fc1, bias1, fc2, bias2))
        experts.append(expert)
    return experts


@torch.no_grad()
def _copy(parameters: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def choose(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return expert [T, k], softmax gate [T, k] in fp32 (sum 1 if k > 1), and GShard's loss."""
    scores = F.linear(x.float(), router.float()).softmax(1)
    gate, expert = scores.topk(top_k, dim=1)
    if top_k > 1:
        gate = gate / gate.sum(1, keepdim=True)
    share = torch.bincount(expert[:, 0], minlength=len(router)) / len(x)
    return expert, gate, len(router) * (scores.mean(0) * share).sum()


def reference(x: Tensor, weights: Weights, top_k: int) -> Tensor:
    """Compute every expert for every token in fp32, weighted by the gate; nothing is dropped."""
    expert, gate, _ = choose(x, weights.router, top_k)
    x = x.float()
    output = torch.zeros_like(x)
    for e, (fc1, bias1, fc2, bias2) in enumerate(zip(*weights[1:], strict=True)):
        inner = F.gelu(F.linear(x, fc1.float(), bias1.float()))
        weight = (gate * (expert == e)).sum(1, keepdim=True)
        output = output + weight * F.linear(inner, fc2.float(), bias2.float())
    return output


class SortLoop(nn.Module):
    """A loop over experts with the tokens sorted by expert; nothing is dropped."""

    def __init__(self, spec: Spec, weights: Weights) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.router = nn.Parameter(weights.router.clone())
        self.build_experts(weights)

    def build_experts(self, weights: Weights) -> None:
        self.experts = expert_modules(weights)

    def apply_experts(self, rows: Tensor, expert: Tensor, counts: Tensor) -> Tensor:
        """Compute rows [T·k, D], which are sorted by their expert [T·k]."""
        parts = rows.split(counts.tolist())
        return torch.cat([run(part) for run, part in zip(self.experts, parts, strict=True)])

    def forward(self, x: Tensor) -> Result:
        expert, gate, loss = choose(x, self.router, self.top_k)
        by_expert, order = expert.flatten().sort(stable=True)
        token = order // self.top_k
        counts = torch.bincount(by_expert, minlength=len(self.router))
        rows = self.apply_experts(x.index_select(0, token), by_expert, counts)
        weighted = rows * gate.flatten()[order, None].to(rows.dtype)
        return torch.zeros_like(x).index_add(0, token, weighted), loss


class GroupedMM(SortLoop):
    """The same with ``torch.nn.functional.grouped_mm``, which has no bias: it is added by row."""

    def build_experts(self, weights: Weights) -> None:
        self.fc1, self.bias1, self.fc2, self.bias2 = (nn.Parameter(t.clone()) for t in weights[1:])

    def apply_experts(self, rows: Tensor, expert: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        inner = F.grouped_mm(rows, self.fc1.transpose(1, 2), offs=ends)
        inner = F.gelu(inner + self.bias1.index_select(0, expert))
        outer = F.grouped_mm(inner, self.fc2.transpose(1, 2), offs=ends)
        return outer + self.bias2.index_select(0, expert)


class DeepSpeed(nn.Module):
    """``deepspeed.moe.layer.MoE``: capacity by expert, no random token selection, no sampling."""

    def __init__(self, spec: Spec, weights: Weights, world: World) -> None:
        import deepspeed
        from deepspeed.moe.layer import MoE

        super().__init__()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Its own ops take a compiler and seconds to build, and the layer uses none.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self.layer = MoE(
            spec.dim,
            feed_forward(spec.dim, spec.hidden),
            num_experts=spec.experts,
            ep_size=world.expert.size,
            k=spec.top_k,
            capacity_factor=spec.capacity_factor,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.layer.set_deepspeed_parallelism()
        inner = self.layer.deepspeed_moe
        inner.experts.deepspeed_experts = expert_modules(weights.local(world))
        self.to(weights.router)
        _copy((inner.gate.wg.weight,), (weights.router,))

    def forward(self, x: Tensor) -> Result:
        output, loss, _ = self.layer(x)
        return output, loss


class FairScale(nn.Module):
    """``fairscale.nn.moe.MOELayer``: GShard's one-hot products, top-2 only, capacity 2·T/E.

    Its mask is fp32 for tokens of any dtype, so bf16 runs under autocast. The second expert is
    drawn with noise, which cannot be turned off.
    """

    def __init__(self, spec: Spec, weights: Weights, world: World) -> None:
        from fairscale.nn.moe import MOELayer, Top2Gate

        super().__init__()
        gate = Top2Gate(spec.dim, spec.experts).to(weights.router)
        _copy((gate.wg.weight,), (weights.router,))
        experts = expert_modules(weights.local(world))
        self.layer = MOELayer(gate, experts, world.expert.handle)

    def forward(self, x: Tensor) -> Result:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            output = self.layer(x.view(len(self.layer.experts), -1, x.shape[1]))
        return output.view_as(x).to(x.dtype), self.layer.l_aux

    @staticmethod
    def memory(spec: Spec, processes: int) -> int:
        """Return the bytes of about five fp32 [T, E, C] tensors at once, over all processes."""
        tokens = spec.tokens // processes
        return processes * 5 * 4 * tokens * 2 * tokens


class Tutel(nn.Module):
    """Tutel's ``moe_layer`` with its own gate and experts; its rows travel in fp32, as its gate."""

    def __init__(self, spec: Spec, weights: Weights, world: World) -> None:
        from tutel import moe

        super().__init__()
        local = weights.local(world)
        self.layer = moe.moe_layer(
            gate_type={
                "type": "top",
                "k": spec.top_k,
                "capacity_factor": spec.capacity_factor,
                "fp32_gate": True,
            },
            model_dim=spec.dim,
            experts={
                "type": "ffn",
                "num_experts_per_device": len(local.fc1),
                "hidden_size_per_expert": spec.hidden,
                "activation_fn": F.gelu,
            },
            group=world.expert.handle,
            batch_prioritized_routing=True,
        ).to(weights.router)
        gate, experts = self.layer.gates[0].float(), self.layer.experts
        _copy(
            (gate.wg.weight, experts.batched_fc1_w, experts.batched_fc1_bias),
            (weights.router, local.fc1, local.bias1),
        )
        _copy(
            (experts.batched_fc2_w, experts.batched_fc2_bias),
            (local.fc2.transpose(1, 2), local.bias2),
        )

    def forward(self, x: Tensor) -> Result:
        output = self.layer(x)
        return output, self.layer.l_aux


def peers(spec: Spec, processes: int) -> dict[str, Builder]:
    """Return the peers of a cell: the loops run on one process, FairScale only with top-2."""
    found: dict[str, Builder] = {"tutel": Tutel, "deepspeed": DeepSpeed}
    if processes == 1:
        found["sort + loop"] = lambda spec, weights, _: SortLoop(spec, weights)
        found["grouped_mm"] = lambda spec, weights, _: GroupedMM(spec, weights)
    if spec.top_k == 2:
        found["fairscale"] = FairScale
    return found
