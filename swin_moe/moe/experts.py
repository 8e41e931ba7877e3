"""Feed-forward experts with stacked weights, and the shared expert of all tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.expert_placement import ExpertShare
from .plan import Kernels

Weights = tuple[Tensor, Tensor, Tensor, Tensor | None]


class ExpertLinear(nn.Module):
    """Weights of a Linear per local expert: ``weight`` [E_local, out, in], ``bias`` [E_local, out].

    Each expert is drawn from its own generator, so that the weights do not depend on the placement
    of experts.

    Args:
        name: fc1 or fc2.
        share: this rank's part of all experts' weights.
    """

    def __init__(
        self, name: str, share: ExpertShare, in_features: int, out_features: int, bias: bool
    ) -> None:
        super().__init__()
        self.name, self.share = name, share
        self.whole = (out_features, in_features)  # shape of one whole expert
        self.weight = nn.Parameter(torch.empty(self._shape("weight", self.whole)))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(self._shape("bias", self.whole[:1])))

    def _shape(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        index = self.share.index(f"{self.name}.{kind}", (self.share.experts.stop, *shape))
        return [part.stop - part.start for part in index]

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        # One draw from the global generator, the same on every rank, then one stream per expert.
        base = int(torch.randint(2**62, (1,), device="cpu"))
        if self.weight.device.type == "meta":
            return
        for expert, weight in zip(self.share.experts, self.weight, strict=True):
            generator = torch.Generator(weight.device)
            generator.manual_seed(base + expert)
            whole = weight if self.share.shards == 1 else weight.new_empty(self.whole)
            nn.init.trunc_normal_(whole, std=std, generator=generator)
            if whole is not weight:
                alone = replace(self.share, experts=range(1))
                weight.copy_(alone.of(f"{self.name}.weight", whole[None])[0])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def parameters_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in ``dtype``."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class Experts(nn.Module):
    """The local experts of one layer: Linear, exact GELU, dropout, Linear.

    If experts are sharded, this is one shard; the outputs of all shards sum to the experts' output.
    """

    def __init__(
        self,
        share: ExpertShare,
        dim: int,
        hidden_dim: int,
        kernels: Kernels,
        *,
        fc2_bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.share = share
        self.fc1 = ExpertLinear("fc1", share, dim, hidden_dim, bias=True)
        self.fc2 = ExpertLinear("fc2", share, hidden_dim, dim, bias=fc2_bias)
        self.kernels = kernels
        self.drop = drop

    def reset_parameters(self, std: float) -> None:
        self.fc1.reset_parameters(std)
        self.fc2.reset_parameters(std)

    def weights_as(self, dtype: torch.dtype) -> Weights:
        """Return the weights in ``dtype``, cast once for several calls of :meth:`forward`."""
        fc1_weight, fc1_bias = self.fc1.parameters_as(dtype)
        fc2_weight, fc2_bias = self.fc2.parameters_as(dtype)
        if fc2_bias is not None and self.share.shards > 1:
            # Each shard adds its part of the bias.
            before = self.share.shard * fc2_bias.shape[1]
            after = fc2_weight.shape[1] - before - fc2_bias.shape[1]
            fc2_bias = F.pad(fc2_bias, (before, after))
        assert fc1_bias is not None
        return fc1_weight, fc1_bias, fc2_weight, fc2_bias

    def forward(
        self, rows: Tensor, used: Tensor, stride: int = 0, weights: Weights | None = None
    ) -> Tensor:
        """Apply the local experts to rows [S, dim], see :func:`swin_moe.ops.moe_experts`."""
        weights = weights or self.weights_as(rows.dtype)
        drop = self.drop if self.training else 0.0
        return self.kernels.experts(rows, used, *weights, stride=stride, dropout_p=drop)


class SharedExpert(nn.Module):
    """A dense feed-forward of every token, added to the experts (https://arxiv.org/abs/2401.06066)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))))
