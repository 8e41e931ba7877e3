"""Mixers of the tokens in a window: attention with its position bias, or SwinMLP's grouped MLP."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import is_leaving, sides, window_attention
from .layers import Fp32Linear
from .position import relative_coords, resize_bias_table, spread_bias_table

CPB_HIDDEN = 512


class Evaluated(NamedTuple):
    """A position bias that evaluation keeps, and copies of the weights that gave it."""

    window_size: int
    sources: list[Tensor]
    bias: Tensor


def _is_kept(source: Tensor) -> bool:
    """Return whether a bias computed from this weight may be kept.

    It may not on a GPU, where a comparison would wait for the device; under ZeRO-3, which leaves
    empty tensors; and where a transform, a fake mode or a functional call replaces the parameter.
    """
    return type(source) is nn.Parameter and source.is_cpu and source.numel() > 0


def _same(kept: Tensor, source: Tensor) -> bool:
    return kept.dtype == source.dtype and torch.equal(kept, source)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module's result depends on its parameters alone: no pruning, no adapters."""
    hooks = module._forward_pre_hooks or module._forward_hooks
    return type(module) in (nn.Sequential, Fp32Linear, nn.ReLU) and not hooks


@torch.no_grad()
def _make_coords(attention: WindowAttention, _: object = None) -> None:
    """Set the coordinates, which no checkpoint holds; each loading of weights calls this.

    Models from the meta device have no coordinates, not even after ``to_empty``.
    """
    if attention.kind == "table":
        return
    if attention.coords.is_meta:
        device = next(attention.parameters()).device
        attention.coords = torch.empty_like(attention.coords, device=device)
    sizes = attention.window_size, attention.pretrained_window_size
    attention.coords.copy_(relative_coords(*sizes, torch.device("cpu")))


class WindowAttention(nn.Module):
    """Attention of one block; state-dict names are the official ones.

    Args:
        dim: width C, a multiple of ``num_heads``.
        window_size: side of the window at the built resolution.
        cosine: cosine attention with a learned scale per head and no bias of k (V2); otherwise the
            scaled dot product with a full qkv bias.
        position_bias: ``table`` (V1), ``log_cpb`` (Swin-MoE: a network over log-spaced offsets) or
            ``log_cpb_sigmoid`` (V2: 16·sigmoid of that network).
        pretrained_window_size: window at which the weights were trained; 0 = ``window_size``.
        qk_scale: factor of the dot product; None = head_dim^−½.
        chunk: see :func:`swin_moe.ops.window_attention`.

    Attributes:
        evaluated_bias: the bias that evaluation keeps, None in training.
    """

    coords: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        cosine: bool = True,
        position_bias: str = "log_cpb_sigmoid",
        pretrained_window_size: int = 0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        chunk: int = 0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.cosine = cosine
        self.kind = position_bias
        self.pretrained_window_size = pretrained_window_size
        self.attn_drop, self.chunk = attn_drop, chunk
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and not cosine)
        if cosine:
            self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
            self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        if position_bias == "table":
            self.relative_position_bias_table = nn.Parameter(
                torch.empty((2 * window_size - 1) ** 2, num_heads)
            )
        else:
            self.cpb_mlp = nn.Sequential(
                Fp32Linear(2, CPB_HIDDEN), nn.ReLU(), Fp32Linear(CPB_HIDDEN, num_heads, bias=False)
            )
            coords = torch.empty((2 * window_size - 1) ** 2, 2)
            self.register_buffer("coords", coords, persistent=False)
            self.register_load_state_dict_post_hook(_make_coords)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.evaluated_bias: Evaluated | None = None

    def train(self, mode: bool = True) -> WindowAttention:
        """Set the mode as in any module, and drop the kept bias."""
        self.evaluated_bias = None
        return super().train(mode)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the attention's own parameters and buffers, not those of its Linear layers."""
        if self.kind == "table":
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        _make_coords(self)
        if self.cosine:
            nn.init.constant_(self.logit_scale, math.log(10.0))
            for bias in (self.q_bias, self.v_bias):
                if bias is not None:
                    nn.init.zeros_(bias)

    def position_bias(self, window_size: int) -> Tensor:
        """Return the bias of each pair of positions in a window, [heads, N, N]; fp32 from networks.

        In evaluation without gradients on a CPU it is computed once, and again after any change of
        its weights.
        """
        graph = torch.compiler.is_compiling() or is_leaving()
        if self.training or torch.is_grad_enabled() or graph:
            return self.compute_position_bias(window_size)
        table = self.kind == "table"
        sources = [self.relative_position_bias_table] if table else [*self.cpb_mlp.parameters()]
        plain = table or all(map(_is_plain, self.cpb_mlp.modules()))
        if not (plain and all(map(_is_kept, sources))):
            return self.compute_position_bias(window_size)
        kept = self.evaluated_bias
        # By value: writes to `.data`, as by averages of weights, change no version counter.
        if (
            kept is None
            or kept.window_size != window_size
            or not all(map(_same, kept.sources, sources))
        ):
            with torch.inference_mode(False), torch.no_grad():
                copies = [source.detach().clone() for source in sources]
                kept = Evaluated(window_size, copies, self.compute_position_bias(window_size))
            self.evaluated_bias = kept
        return kept.bias

    def compute_position_bias(self, window_size: int) -> Tensor:
        """Compute the bias that :meth:`position_bias` returns."""
        table: Tensor
        if self.kind == "table":
            table = resize_bias_table(self.relative_position_bias_table, window_size)
        else:
            coords = self.coords
            if window_size != self.window_size:  # another resolution than the built one
                trained = self.pretrained_window_size or self.window_size
                coords = relative_coords(window_size, trained, coords.device)
            table = self.cpb_mlp(coords)  # [(2w−1)², heads]
        if self.kind == "log_cpb_sigmoid":
            table = 16 * table.sigmoid()
        return spread_bias_table(table, window_size)

    def project_qkv(self, x: Tensor) -> Tensor:
        """Return q, k and v of tokens [..., C], concatenated: [..., 3·C]."""
        if not self.cosine or self.q_bias is None or self.v_bias is None:
            return self.qkv(x)
        # A bias of k would add the same to all logits of a query, which softmax cancels.
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return F.linear(x, self.qkv.weight, bias)

    def forward(self, x: Tensor, window_size: int, shift_size: int) -> Tensor:
        """Mix x [B, H, W, C] within windows; window and shift are those for this resolution."""
        if self.cosine:
            scale: Tensor = self.logit_scale
        else:
            scale = x.new_full((self.num_heads, 1, 1), self.scale, dtype=torch.float32)
        out = window_attention(
            self.project_qkv(x).unflatten(3, (3, self.num_heads, -1)),
            self.position_bias(window_size),
            scale,
            window_size=window_size,
            shift_size=shift_size,
            cosine=self.cosine,
            dropout_p=self.attn_drop if self.training else 0.0,
            chunk=self.chunk,
        )
        return self.proj_drop(self.proj(out))


class SpatialMlp(nn.Conv1d):
    """SwinMLP's mixer: per head one dense layer over the window's positions.

    ``weight`` is [heads·N, N, 1] and ``bias`` [heads·N], with N = window_size² at any resolution.
    Maps are padded with zeros to whole windows, and also to shift the windows.
    """

    def __init__(self, num_heads: int, window_size: int) -> None:
        channels = num_heads * window_size**2
        super().__init__(channels, channels, 1, groups=num_heads)
        self.num_heads = num_heads
        self.window_size = window_size

    def mix(self, x: Tensor, shift_size: int) -> Tensor:
        """Mix x [B, H, W, C] within windows shifted by ``shift_size``."""
        (B, _, _, C), (H, W) = x.shape, sides(x)
        w, heads = self.window_size, self.num_heads
        before = w - shift_size if shift_size else 0
        rows, cols = -(-(H + before) // w), -(-(W + before) // w)
        x = F.pad(x, (0, 0, before, cols * w - W - before, before, rows * w - H - before))
        x = x.view(B, rows, w, cols, w, heads, C // heads)
        # [windows, heads·N, head_dim]
        x = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B * rows * cols, heads * w * w, C // heads)
        x = self(x).view(B, rows, cols, heads, w, w, C // heads)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, rows * w, cols * w, C)
        return x[:, before : before + H, before : before + W]
