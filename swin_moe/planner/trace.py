"""Memory and work of a training step, traced on the real model without data.

The model is built on the meta device and runs forward and backward on fake tensors, which have
shapes only. A dispatch mode sees the memory that each op allocates, reads and writes, its products,
and the moment at which memory is freed. Two batch sizes give two traces with the same events. Every
size is affine in the batch, so that the two traces predict any batch.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import ops
from ..distributed import Group
from ..models import Outputs, expert_parameter_names
from ..moe import moe_layers
from ..tasks import Task, build_task
from ..training.precision import cast_floating, predictions_in_fp32
from .stand_ins import stand_in

BATCHES = (8, 16)  # images; enough that rounding of the experts' capacity does not show


@dataclass(frozen=True)
class Affine:
    """``fixed + slope · images``, elementwise."""

    fixed: np.ndarray
    slope: np.ndarray

    def at(self, images: float) -> np.ndarray:
        return self.fixed + self.slope * images


@dataclass(frozen=True)
class Trace:
    """A forward and a backward pass of one rank.

    Attributes:
        live: [events] bytes that the pass holds, without weights and gradients of parameters.
        travelling: [events] the part of ``live`` that is rows on their way between ranks.
        dense_grads, expert_grads: [events] elements of the gradients that exist by then.
        forward_events: number of events in the forward pass.
        flops: [ops] operations of matrix products.
        moved: [ops] bytes that each op reads and writes.
        forward_ops: number of ops in the forward pass.
        expert_elements: elements of this rank's experts in all layers.
    """

    live: Affine
    travelling: Affine
    dense_grads: np.ndarray
    expert_grads: np.ndarray
    forward_events: int
    flops: Affine
    moved: Affine
    forward_ops: int
    expert_elements: int


def trace(
    task: Task,
    *,
    dtype: torch.dtype,
    autocast: bool = False,
    expert_parallel_size: int = 1,
    fused: bool = True,
    padded: bool = False,
) -> Trace:
    """Trace a training step of one rank.

    Args:
        dtype: of the weights; with ``autocast``, of the products only.
        fused: use the compiled ops, otherwise their references.
        padded: rows travel at full capacity, as they do on a GPU.
    """
    runs = []
    for images in BATCHES:
        with ops.assume_fused(fused):
            run = _run(task, images, dtype, autocast, expert_parallel_size, padded, fused)
            runs.append(run)
    one, two = runs
    if one.steps != two.steps or len(one.moved) != len(two.moved):
        raise RuntimeError("the two traces differ in their ops: memory cannot be extrapolated")
    return Trace(
        live=_affine(one.live, two.live),
        travelling=_affine(one.travelling, two.travelling),
        dense_grads=np.array(one.dense_grads),
        expert_grads=np.array(one.expert_grads),
        forward_events=one.forward_events,
        flops=_affine(one.flops, two.flops),
        moved=_affine(one.moved, two.moved),
        forward_ops=one.forward_ops,
        expert_elements=one.expert_elements,
    )


def _affine(one: list[int], two: list[int]) -> Affine:
    low, high = np.array(one, dtype=np.float64), np.array(two, dtype=np.float64)
    slope = (high - low) / (BATCHES[1] - BATCHES[0])
    return Affine(low - slope * BATCHES[0], slope)


class _Recorder(TorchDispatchMode):
    """A mode that counts every storage from the op that makes it until it is freed."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        # A storage is known by its address, which another one gets after it is freed.
        self._known: dict[int, weakref.ref[Any]] = {}
        self._now = self._away = self._dense = self._expert = 0
        self.live: list[int] = []
        self.travelling: list[int] = []
        self.dense_grads: list[int] = []
        self.expert_grads: list[int] = []
        self.flops: list[int] = []
        self.moved: list[int] = []
        self.steps = 0
        self.forward_events = self.forward_ops = self.expert_elements = 0
        for tensor in held:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps += 1
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [self._note(tensor, func) for tensor in tensors]
        if any(made) or func._schema.is_mutable:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved.append(sum(t.numel() * t.element_size() for t in (*read, *tensors)))
            self.flops.append(_flops(func, args, kwargs or {}, result))
        return result

    def _note(self, tensor: Tensor, func: Any) -> bool:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._known.get(address)
        if known is not None and known() is not None:
            return False
        travels = func in _ON_THE_WAY
        self._now += size
        self._away += size * travels
        self._record()

        def gone(_: Any) -> None:
            self._now -= size
            self._away -= size * travels
            self._known.pop(address, None)

        self._known[address] = weakref.ref(storage, gone)
        return True

    def _record(self) -> None:
        self.live.append(self._now)
        self.travelling.append(self._away)
        self.dense_grads.append(self._dense)
        self.expert_grads.append(self._expert)

    def take_gradient(self, parameter: Tensor, expert: bool) -> None:
        """Count the finished gradient of a parameter as a gradient, and free it."""
        assert parameter.grad is not None
        if expert:
            self._expert += parameter.numel()
        else:
            self._dense += parameter.numel()
        parameter.grad = None
        self._record()


# `stand_ins` allocate with this op where a real exchange allocates its receive buffers.
_ON_THE_WAY = (torch.ops.aten.new_empty_strided.default,)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the operations of matrix products; for fused ops they follow from shapes."""
    if func._overloadpacket in flop_registry:
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
    name = func._schema.name
    if name.startswith("swin_moe::window_attention"):
        backward = name.endswith("_backward")
        B, H, W, _, heads, width = args[1 if backward else 0].shape
        window = args[2 if backward else 1].shape[1]
        # Two products forward; backward repeats the first and has four of its own.
        return (5 if backward else 2) * 2 * B * H * W * heads * width * window
    if name == "swin_moe::moe_experts":
        rows, weight = args[0], args[2]
        return 4 * rows.shape[0] * weight.shape[1] * weight.shape[2]
    if name == "swin_moe::moe_experts_backward":
        rows, weight = args[1], args[3]
        return 8 * rows.shape[0] * weight.shape[1] * weight.shape[2]
    return 0


def _run(
    task: Task,
    images: int,
    dtype: torch.dtype,
    autocast: bool,
    group: int,
    padded: bool,
    fused: bool,
) -> _Recorder:
    model = meta_model(task, group)
    with FakeTensorMode():
        _make_fake(model, torch.float32 if autocast else dtype)
        model.train()
        for layer in moe_layers(model).values():
            stand_in(layer, padded, fused)
        batch = task.example_batch(images, torch.device("cpu"))
        cast = batch if autocast else batch._replace(inputs=cast_floating(batch.inputs, dtype))
        held = [*model.parameters(), *model.buffers()]
        held += [x for x in tree_leaves((batch, cast)) if isinstance(x, Tensor)]
        recorder = _Recorder(held)
        hooks = _take_gradients(model, recorder)

        def forward(inputs: dict[str, Tensor]) -> Outputs:
            with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
                outputs: Outputs = model(**inputs)
            return predictions_in_fp32(outputs)

        with recorder:
            _, _, loss = task.step(forward, cast)
            recorder._record()
            recorder.forward_events, recorder.forward_ops = len(recorder.live), len(recorder.moved)
            loss.backward()
        for hook in hooks:
            hook.remove()
        names = expert_parameter_names(model)
        own = [p.numel() for n, p in model.named_parameters() if n in names]
        recorder.expert_elements = sum(own)
    return recorder


def meta_model(task: Task, expert_parallel_size: int) -> nn.Module:
    """Return a rank's model, with its share of the experts, on the meta device."""
    moe = task.config.moe.model_copy(update={"backend": "fused", "overlap_degree": 1})
    same = build_task(task.config.model_copy(update={"moe": moe}))
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return same.build_model(Group(None, 0, expert_parallel_size))


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _take_gradients(model: nn.Module, recorder: _Recorder) -> list[Any]:
    experts = expert_parameter_names(model)

    def hook_of(name: str) -> Any:
        return lambda parameter: recorder.take_gradient(parameter, name in experts)

    return [
        parameter.register_post_accumulate_grad_hook(hook_of(name))
        for name, parameter in model.named_parameters()
    ]
