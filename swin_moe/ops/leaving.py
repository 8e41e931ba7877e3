"""Graphs that leave Python: exported (``torch.export``, ONNX) or traced (``torch.jit.trace``).

They must run without this package, also in other runtimes. So each of our ops is replaced by its
reference in torch's own ops. A graph accepts any number of images. In a trace, the image's height
and width are constants, and the trace checks them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def is_leaving() -> bool:
    """Return whether such a graph is being made. A ``torch.compile`` graph keeps our ops."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def fixed(size: int) -> int:
    """Return a size independent of the number of images; in a trace, a plain number.

    Tracing turns sizes into tensors, on which Python cannot branch.
    """
    return int(size) if torch.jit.is_tracing() else size


def stable_order(x: Tensor, dim: int, *, descending: bool) -> Tensor:
    """Return the indices that sort a dimension; equal elements stay in order."""
    if is_leaving() and torch.onnx.is_in_onnx_export():  # ONNX's TopK keeps the order
        return x.sort(dim, descending).indices
    return x.sort(dim=dim, descending=descending, stable=True).indices


def sides(x: Tensor) -> tuple[int, int]:
    """Return height and width of a map [B, H, W, ...]."""
    return fixed(x.shape[1]), fixed(x.shape[2])


def of_one_size(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] unchanged, and bind a trace or ONNX graph to this H and W.

    Raises:
        ValueError: the graph has dynamic sides, and may be for ONNX, which does not check them.
    """
    if torch.jit.is_tracing():
        # Branches on a size are safe, since the trace checks it.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="swin_moe")
        height, width = fixed(images.shape[2]), fixed(images.shape[3])
        if torch.onnx.is_in_onnx_export():  # dynamo=False: its Expand refuses other sizes
            return images.expand(-1, -1, height, width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
            check = torch.jit.script(_of_size)
        return check(images, height, width)
    # ONNX tries again with strict=True, where dynamo cannot see that the export is for ONNX.
    strict = torch.compiler.is_dynamo_compiling()
    if torch.compiler.is_exporting() and (strict or torch.onnx.is_in_onnx_export()):
        from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

        if not (has_static_value(images.shape[2]) and has_static_value(images.shape[3])):
            raise ValueError(
                "a model in ONNX, or exported with strict=True, accepts images of one size: leave "
                "height and width out of dynamic_shapes, and export it once for each size"
            )
    return images


def _of_size(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2] != height or images.shape[3] != width:
        raise ValueError(
            f"traced with images of {height} x {width} pixels, called with "
            f"{images.shape[2]} x {images.shape[3]}: trace the model again with those"
        )
    return images
