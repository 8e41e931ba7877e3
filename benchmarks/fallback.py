"""Kernels and bytes of the references, which run where a GPU has no kernel of ours; no GPU needed.

    python -m benchmarks.fallback [--json PATH] [--quick]

Attention is counted in bytes per score (one number of the matrices of logits), in bf16: the size of
all tensors that each op reads and writes, views aside. Of a compiled graph, these are the inputs
and outputs of its fused kernels. The peer is timm's WindowAttention (V2) between its two layers.
The experts are counted in launches and host waits of one layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import harness
from benchmarks.attention_peers import Inputs, timm_attention
from swin_moe import ops
from swin_moe.ops import experts_reference
from swin_moe.ops.window_reference import Windows, attend_reference, attention_reference

WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh"}


class Count(NamedTuple):
    """Kernels that were launched, and the bytes that they read and wrote."""

    kernels: int
    bytes: int


class Counting(TorchDispatchMode):
    """A count of kernels and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(options or {}))
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and name not in WITHOUT_KERNEL and name != "_unsafe_view":
            self.kernels += 1
            tensors = tree_leaves((arguments, options, result))
            self.bytes += sum(_size(tensor) for tensor in tensors if isinstance(tensor, Tensor))
        return result

    def take(self) -> Count:
        """Return the count, and begin again."""
        count = Count(self.kernels, self.bytes)
        self.kernels = self.bytes = 0
        return count


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's different elements; an expanded one is read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    numbers = 1
    for size, stride in sizes:
        numbers *= size if stride or size == 1 else 1
    return numbers * tensor.element_size()


def eager(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Count, Count]:
    """Return the counts of a function and of its backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with Counting() as counting:
        out = function(*leaves)
        forward = counting.take()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return forward, counting.take()


def compiled(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Count, Count]:
    """Return the counts of a compiled function and of its backward pass.

    They are the compiler's own list of its kernels' buffers. It fuses on a CPU as on a GPU, except
    that it may split a reduction into two kernels there.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    counts: dict[bool, Count] = {}
    codegen = GraphLowering.codegen

    def counted(self: Any, *arguments: Any) -> Any:
        result = codegen(self, *arguments)
        sizes = [node.get_read_write_buffers_sizes() for node in self.scheduler.nodes]
        counts[self.is_backward] = Count(sum(size > 0 for size in sizes), int(sum(sizes)))
        return result

    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with (
        functorch.patch(force_non_lazy_backward_lowering=True),
        inductor.patch(force_disable_caches=True),
        mock.patch.object(GraphLowering, "codegen", counted),
        # The C++ compiler would take minutes. Without it the graph fails once it is counted.
        mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=None),
        contextlib.suppress(TypeError),
    ):
        torch.compile(function, fullgraph=True)(*leaves)
    return counts[False], counts[True]


def attention(window: int, shift: int) -> list[dict[str, object]]:
    """Return the cells of one window: kernels and bytes per score, there and back."""
    heads, width = 4, 32
    side, tokens = 2 * window, window**2
    windows = Windows((window, window), (shift, shift))
    qkv = torch.randn(2, side, side, 3, heads, width).bfloat16()
    bias, scale = torch.randn(heads, tokens, tokens), torch.rand(heads, 1, 1)
    mask = windows.mask(side, side, qkv)
    timm = Inputs(qkv, bias, scale, mask, window, shift)
    split = windows.split(qkv)

    def graph(x: Tensor, *others: Tensor) -> Tensor:
        return attend_reference(x, *others, None, windows, mask, scale_q=True)

    counts = {
        "eager": eager(lambda *x: attention_reference(*x, None, windows), [qkv, bias, scale]),
        "compiled": compiled(graph, [split, bias, scale]),
        "timm": eager(
            lambda *x: timm_attention(timm._replace(qkv=x[0], bias=x[1], scale=x[2])),
            [qkv, bias, scale],
        ),
    }
    scores = 2 * 4 * heads * tokens**2
    name = f"attention, window {window}" + (", shifted" if shift else "")
    cells = []
    for place, mode in enumerate(("forward", "backward")):
        found = {key: round(pair[place].bytes / scores, 1) for key, pair in counts.items()}
        kernels = {key: pair[place].kernels for key, pair in counts.items()}
        cells.append(
            harness.figure(
                name, "bytes a score", found["compiled"], mode=mode, dtype="bfloat16",
                eager=found["eager"], timm=found["timm"], kernels=kernels,
            )
        )  # fmt: skip
    return cells


def experts(stride: int, dtype: torch.dtype, capability: int) -> list[dict[str, object]]:
    """Return the cells of a layer of 8 experts on a kind of GPU: launches, and waits there."""
    E, D, H = 8, 64, 256
    rows = torch.randn(E * 64, D, dtype=dtype)
    used = torch.full((E,), 48 if stride else 64)
    weights = [torch.randn(shape, dtype=dtype) for shape in ((E, H, D), (E, H), (E, D, H), (E, D))]
    torch.cuda.get_device_capability = lambda *_: (capability, 0)
    waits = 0
    with FakeTensorMode():
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (rows, used)]
        both = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in weights]
        try:
            ops.moe_experts_reference(*tensors, *both, stride=stride)
        except DataDependentOutputException:
            waits = 1

    def run(rows: Tensor, *weights: Tensor) -> Tensor:
        if stride:
            return experts_reference.experts_batched(rows, used, weights, stride, 0.0, None)
        if waits:
            return ops.moe_experts_reference(rows, used, *weights)
        return experts_reference.experts_grouped(rows, used, weights, 0.0, None)

    counts = eager(run, [rows, *weights])
    name = f"experts, {'padded' if stride else 'packed'}, sm_{capability}x"
    kind = str(dtype).removeprefix("torch.")
    return [
        harness.figure(
            name, "kernels", count.kernels, mode=mode, dtype=kind,
            waits=waits if mode == "forward" else 0,
        )
        for mode, count in zip(("forward", "backward"), counts, strict=True)
    ]  # fmt: skip


def dispatch() -> list[dict[str, object]]:
    """Return the cells of dispatch and combine, two choices a token."""
    T, D = 256, 64
    order = torch.randperm(2 * T)
    source, destination = order.int(), order.argsort().int().view(T, 2)

    def run(x: Tensor, gate: Tensor) -> Tensor:
        rows = ops.moe_dispatch_reference(x, source, destination)
        return ops.moe_combine_reference(rows, gate, source, destination)

    counts = eager(run, [torch.randn(T, D), torch.rand(T, 2)])
    return [
        harness.figure("dispatch and combine", "kernels", count.kernels, mode=mode, waits=0)
        for mode, count in zip(("forward", "backward"), counts, strict=True)
    ]


def main() -> None:
    assert __doc__ is not None
    options = harness.arguments(__doc__).parse_args()
    harness.choose_device("cpu")
    torch.manual_seed(0)
    cells = []
    for window, shift in [(8, 4)] if options.quick else [(8, 4), (16, 0), (16, 8)]:
        cells += attention(window, shift)
    for stride, dtype, capability in (
        (64, torch.bfloat16, 8),
        (0, torch.bfloat16, 9),
        (0, torch.bfloat16, 8),
        (0, torch.float32, 9),
    ):
        cells += experts(stride, dtype, capability)
    cells += dispatch()
    columns = ["name", "dtype", "mode", "unit", "ours", "eager", "timm", "kernels", "waits"]
    harness.report(
        "The references", columns, [[str(cell.get(key, "")) for key in columns] for cell in cells]
    )
    harness.write_json(options.json, cells)


if __name__ == "__main__":
    main()
