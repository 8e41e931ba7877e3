"""Feed-forward experts with stacked weights, and the one that every token meets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plan import Kernels


class ExpertLinear(nn.Module):
    """Weights of a Linear per local expert: ``weight`` [E_local, out, in], ``bias`` [E_local, out].

    ``first_expert`` is the global index of the first one. Each expert is drawn from a generator of
    its own, so that the weights do not depend on how experts are spread over processes.
    """

    def __init__(
        self, num_local: int, first_expert: int, in_features: int, out_features: int, bias: bool
    ) -> None:
        super().__init__()
        self.first_expert = first_expert
        self.weight = nn.Parameter(torch.empty(num_local, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_local, out_features)) if bias else None

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        # One draw from the global generator, the same on every rank, then one stream per expert.
        base = int(torch.randint(2**62, (1,), device="cpu"))
        if self.weight.device.type == "meta":
            return
        for local, weight in enumerate(self.weight):
            generator = torch.Generator(weight.device)
            generator.manual_seed(base + self.first_expert + local)
            nn.init.trunc_normal_(weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def parameters_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class Experts(nn.Module):
    """The local experts of one layer: Linear, exact GELU, dropout, Linear."""

    def __init__(
        self,
        num_local: int,
        first_expert: int,
        dim: int,
        hidden_dim: int,
        kernels: Kernels,
        *,
        fc2_bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = ExpertLinear(num_local, first_expert, dim, hidden_dim, bias=True)
        self.fc2 = ExpertLinear(num_local, first_expert, hidden_dim, dim, bias=fc2_bias)
        self.kernels = kernels
        self.drop = drop

    def reset_parameters(self, std: float) -> None:
        self.fc1.reset_parameters(std)
        self.fc2.reset_parameters(std)

    def forward(self, rows: Tensor, used: Tensor, stride: int = 0) -> Tensor:
        """Rows [S, dim] of the local experts, see :func:`swin_moe.ops.moe_experts`."""
        weights = (*self.fc1.parameters_as(rows.dtype), *self.fc2.parameters_as(rows.dtype))
        drop = self.drop if self.training else 0.0
        return self.kernels.experts(rows, used, *weights, stride=stride, dropout_p=drop)


class SharedExpert(nn.Module):
    """A dense feed-forward beside the experts, for every token (https://arxiv.org/abs/2401.06066)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))))
