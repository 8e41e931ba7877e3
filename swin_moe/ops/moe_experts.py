"""The experts' feed-forward on rows that are sorted by expert: Linear, exact GELU, dropout, Linear.

Rows S of all experts lie one after the other: packed, the rows of expert e start where those of
e − 1 end, or padded, at e · stride. Each expert has ``used[e]`` of them; rows past those are empty:
they are not computed, and what the results hold there is undefined but finite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_experts_reference(
    rows: Tensor,
    used: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    stride: int = 0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Each expert's rows through its feed-forward, in plain PyTorch.

    Args:
        rows: [S, D]. used: [E] int64, rows of each expert.
        fc1_weight: [E, H, D]. fc1_bias: [E, H]. fc2_weight: [E, D, H]. fc2_bias: [E, D] or None.
        stride: rows from one expert's first to the next one's; 0 = packed.
        dropout_p: dropout after the GELU.

    Returns:
        [S, D].
    """
    parts, row = [], 0
    for expert, count in enumerate(used.tolist()):
        x = rows[row : row + count]
        hidden = F.gelu(F.linear(x, fc1_weight[expert], fc1_bias[expert]))
        hidden = F.dropout(hidden, dropout_p)
        bias = None if fc2_bias is None else fc2_bias[expert]
        parts.append(F.linear(hidden, fc2_weight[expert], bias))
        skipped = stride - count if stride else 0
        parts.append(rows.new_zeros(skipped, rows.shape[1]))
        row += count + skipped
    parts.append(rows.new_zeros(rows.shape[0] - row, rows.shape[1]))
    return torch.cat(parts)


moe_experts = moe_experts_reference
