"""Products in full fp32, also where ``precision.tf32`` lets others be less precise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b without TF32: on a GPU that may use it, the product is computed in fp64.

    The gradients are, too. PyTorch has no switch for a single product.

    Args:
        x: [..., in], of the weight's dtype. weight: [out, in]. bias: [out].
    """
    if not (x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.double()
    return F.linear(x.double(), weight.double(), bias).float()


class ExactLinear(nn.Linear):
    """A Linear layer that never computes in TF32."""

    def forward(self, input: Tensor) -> Tensor:
        return exact_linear(input, self.weight, self.bias)
