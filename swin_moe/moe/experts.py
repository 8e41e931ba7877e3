"""Feed-forward experts with stacked weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """One Linear per local expert: ``weight`` [E_local, out, in], ``bias`` [E_local, out].

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

    def forward(self, x: Tensor, rows: list[int] | None = None) -> Tensor:
        """x [E_local, N, in], or [Σ rows, in] expert by expert, to the same with ``out`` last."""
        if rows is not None:
            biases = [None] * len(rows) if self.bias is None else self.bias.unbind()
            parts = zip(x.split(rows), self.weight.unbind(), biases, strict=True)
            return torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts])
        weight = self.weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.bias[:, None], x, weight)


class Experts(nn.Module):
    """The local experts of one layer: Linear, exact GELU, dropout, Linear."""

    def __init__(
        self,
        num_local: int,
        first_expert: int,
        dim: int,
        hidden_dim: int,
        *,
        fc2_bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = ExpertLinear(num_local, first_expert, dim, hidden_dim, bias=True)
        self.fc2 = ExpertLinear(num_local, first_expert, hidden_dim, dim, bias=fc2_bias)
        self.drop = nn.Dropout(drop)

    def reset_parameters(self, std: float) -> None:
        self.fc1.reset_parameters(std)
        self.fc2.reset_parameters(std)

    def forward(self, x: Tensor, rows: list[int] | None = None) -> Tensor:
        """x [E_local, N, dim], or [Σ rows, dim] with the row count of each expert."""
        return self.fc2(self.drop(F.gelu(self.fc1(x, rows))), rows)
