"""Config to DeepSpeed: ZeRO, precision, expert groups, clipping. The only file that imports it."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import Fragment, persistent_buffers, whole_fragments
from ..common.deferred import import_uncompiled
from ..config import OptimizerConfig, ZeroConfig
from ..distributed import World, all_reduce_, barrier
from ..distributed.expert_placement import BUCKET, SUB_GROUP
from ..models import Outputs, expert_parameter_names
from ..moe import num_experts
from .adamw import MOMENTS, PAIRS, PairedAdamW, moment_views, start_moments
from .optim import build_optimizer, parameter_groups
from .precision import cast_floating, predictions_in_fp32

# isort: split
# After `distributed`, which tells it the accelerator.
import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups

log = logging.getLogger("swin_moe")

# What we use of DeepSpeed beyond its documented interface.
_INTERNALS = (
    (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"),
    (DeepSpeedZeroOptimizer_Stage3, "_swappable_optimizer_subgroup"),
    (DeepSpeedZeroOptimizer_Stage3, "_optimizer_states_and_gradient_swap_in"),
    (DeepSpeedZeroOptimizer_Stage3, "_optimizer_states_and_gradient_swap_out"),
    (DeepSpeedZeroOptimizer_Stage3, "_release_swap_buffers"),
    (deepspeed.zero.Init, "_convert_to_zero_parameters"),
    (deepspeed_groups, "_EXPERT_PARALLEL_GROUP"),
    (deepspeed_groups, "_EXPERT_DATA_PARALLEL_GROUP"),
)


def _prepare_nvme(zero: ZeroConfig, world: World) -> None:
    """Build what reads and writes the files, once for all processes of a node.

    Raises:
        ValueError: that cannot be done here.
    """
    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        raise ValueError(
            "zero.offload_optimizer=nvme needs libaio and its headers (apt install libaio-dev) and "
            "a C++ compiler, with which DeepSpeed builds its reader on first use"
        )
    try:
        Path(zero.nvme_path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"zero.nvme_path={zero.nvme_path}: {error.strerror}") from None
    if world.local_rank == 0:
        log.info("building DeepSpeed's async_io, if it is not there yet: a few minutes")
        builder.load(verbose=False)
    barrier()


# ZeRO asks whether the optimizer is a Muon. That file compiles three functions by decorators.
import_uncompiled("deepspeed.runtime.zero.muon.original_muon")


def check_deepspeed() -> None:
    """Raise ``ValueError`` if this DeepSpeed lacks what we use of its internals."""
    for holder, name in _INTERNALS:
        if not hasattr(holder, name):
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} is not supported (it has no {name}): "
                "install the version in requirements/lock.txt"
            )


def _bucket(model: nn.Module) -> int:
    """Elements gathered before they are reduced; ZeRO-3 takes larger parameters as they are."""
    return max(BUCKET, largest_parameter(model))


def largest_parameter(model: nn.Module) -> int:
    """Elements of the largest parameter, whether ZeRO-3 has cut it or not."""
    return max(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def cutter(
    zero: ZeroConfig, world: World, dtype: torch.dtype, largest: int
) -> Callable[[list[nn.Parameter]], None]:
    """What cuts parameters over the ranks as ZeRO-3 does, before there is an :class:`Engine`.

    A model whose weights were all cut as soon as they were made never was whole in any rank's
    memory. Every rank must cut the same parameters in the same order.

    Args:
        largest: elements of the largest parameter.
    """
    if zero.uses_files:
        _prepare_nvme(zero, world)
    deepspeed.ops.__compatible_ops__ = {}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **_offloaded_weights(zero, world, largest)},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    # Of a module without parameters: what it does for those of a whole one is to follow.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)

    def cut(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(world.device, dtype)
        init._convert_to_zero_parameters(parameters)

    return cut


def _offloaded_weights(zero: ZeroConfig, world: World, largest: int) -> dict[str, Any]:
    if zero.offload_param == "none":
        return {}
    settings: dict[str, Any] = {"device": zero.offload_param}
    if zero.offload_param == "nvme":
        part = -(-largest // world.size)  # of a parameter, on a rank
        settings |= {"nvme_path": zero.nvme_path, "max_in_cpu": 0, "buffer_size": part}
    return {"offload_param": settings}


def reserved_bytes(
    zero: ZeroConfig,
    optimizer: OptimizerConfig,
    model: nn.Module,
    dtype: torch.dtype,
    world: World,
) -> int:
    """What DeepSpeed holds on the device beside weights and gradients of the model's own dtype."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    elsewhere = zero.offload_optimizer == "nvme" or (
        zero.offload_optimizer == "cpu" and world.device.type != "cpu"
    )
    moments = 0 if elsewhere else (4 if optimizer.moments == "bf16" else 8) * parameters
    if zero.stage == 0:
        return moments
    masters = 0 if elsewhere else 4 * parameters  # ZeRO-3 copies those of fp32 weights, too
    # Experts are cut over their replicas alone; ranks that hold others replicate none.
    replicas = world.expert_data.size if world.expert.size > 1 else world.size
    return (masters + moments) // replicas + 2 * _bucket(model) * dtype.itemsize


class _ExpertMarker(MoE):
    """Stands in for our MoE layers: DeepSpeed looks for instances of its own class.

    It has no parameters and is never called; it only says that the model has experts.
    """

    def __init__(self, num_experts: int, world: World) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = world.expert.size
        self.num_local_experts = max(num_experts // world.expert.size, 1)  # or a shard of one
        self.expert_group_name = _group_name(world)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already: they are those of ``distributed.init``."""


def _group_name(world: World) -> str:
    return f"ep_size_{world.expert.size}"


class _Part(NamedTuple):
    """What a rank holds of a flattened parameter from element ``start`` on, by kind."""

    name: str
    start: int
    values: dict[str, Tensor]


class Engine:
    """A model under DeepSpeed.

    With an expert group of one rank the experts are ordinary parameters, which any ZeRO stage may
    shard. Otherwise they are reduced over the expert-data group only. At ZeRO stage 0, bf16 means
    autocast over fp32 weights and clipping is done here, because DeepSpeed averages the norms of
    the ranks there, which is not the norm of all experts; from stage 1 on, weights are bf16 with
    fp32 masters, and its norm is the true one.

    Attributes:
        model: the module inside. optimizer: the one whose rates a schedule may set.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        optimizer: OptimizerConfig,
        zero: ZeroConfig,
        dtype: torch.dtype,
        micro_batch: int,
        gradient_accumulation_steps: int,
    ) -> None:
        check_deepspeed()
        if zero.uses_files:
            _prepare_nvme(zero, world)
        self.world = world
        self.model = model
        self._nvme_path = zero.nvme_path if zero.uses_files else ""
        self.stage = zero.stage
        self.dtype = dtype
        self.clip_norm = optimizer.clip_norm
        experts = expert_parameter_names(model) if world.expert.size > 1 else set()
        self.expert_names = experts
        self.parameters = dict(model.named_parameters())
        self.buffers = persistent_buffers(model)
        groups = parameter_groups(model, optimizer.weight_decay, optimizer.layer_decay)
        if experts:
            self._mark_experts(groups)
        global_batch = micro_batch * gradient_accumulation_steps * world.size
        self.optimizer = build_optimizer(groups, optimizer, global_batch)
        # Probing and building DeepSpeed's own ops takes seconds and a compiler; none is used.
        deepspeed.ops.__compatible_ops__ = {}
        settings = self._settings(zero, micro_batch, gradient_accumulation_steps)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self._grad_norm: Tensor | float = 0.0
        self._start_moments(0)

    def _settings(self, zero: ZeroConfig, micro_batch: int, accumulation: int) -> dict[str, Any]:
        stage: dict[str, Any] = {
            "stage": zero.stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": _bucket(self.model) if zero.stage < 3 else BUCKET,
            "sub_group_size": SUB_GROUP,
            "overlap_comm": self.world.device.type == "cuda",
        }
        if zero.offload_optimizer != "none":
            stage["offload_optimizer"] = {"device": zero.offload_optimizer}
        if zero.offload_optimizer == "nvme":
            stage["offload_optimizer"]["nvme_path"] = zero.nvme_path
        stage |= _offloaded_weights(zero, self.world, largest_parameter(self.model))
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": self.clip_norm if zero.stage else 0.0,
            "zero_optimization": stage,
            "bf16": {"enabled": self._low_precision_weights, "check_grad_overflow": True},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }

    @property
    def _moment_keys(self) -> tuple[str, ...]:
        return (PAIRS,) if isinstance(self.optimizer, PairedAdamW) else MOMENTS

    @property
    def _low_precision_weights(self) -> bool:
        return self.stage > 0 and self.dtype == torch.bfloat16

    def _mark_experts(self, param_groups: list[dict[str, Any]]) -> None:
        """Tell DeepSpeed which parameters are experts and which ranks replicate them."""
        name = _group_name(self.world)
        for parameter_name in self.expert_names:
            parameter = self.parameters[parameter_name]
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]
        for group in param_groups:
            if group["moe"]:
                group["name"] = name
        deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = self.world.expert.handle
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = self.world.expert_data.handle
        self.model.add_module("expert_marker", _ExpertMarker(num_experts(self.model), self.world))

    # ----------------------------------------------------------------------------------------
    # One step

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """Call the model with its arguments by name, in fp32; predictions come back in fp32."""
        if self._low_precision_weights:
            inputs = cast_floating(inputs, self.dtype)
        with self._autocast():
            outputs: Outputs = self._engine(**inputs)
        return predictions_in_fp32(outputs)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.stage == 0 and self.dtype == torch.bfloat16:
            return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; they are reduced with the last micro-step (ZeRO-2 and 3: each)."""
        self._engine.backward(loss)

    @property
    def at_boundary(self) -> bool:
        """Whether the next :meth:`step` updates the weights."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self) -> None:
        """To be called after every backward; updates the weights at the boundary.

        Raises:
            FloatingPointError: the global gradient norm is not finite; weights and moments are
                unchanged, and training may go on.
        """
        boundary = self.at_boundary
        if boundary and self.stage == 0:
            self._grad_norm = self._clip_gradients()
            if not self._norm_is_finite():
                for parameter in self.parameters.values():
                    parameter.grad = None  # the optimizer passes over those
        self._engine.step()
        if boundary and self.stage > 0:  # DeepSpeed leaves a bad step out by itself
            self._grad_norm = self._engine.get_global_grad_norm()
        if boundary and not self._norm_is_finite():
            raise FloatingPointError("the gradient norm is not finite")

    def _norm_is_finite(self) -> bool:
        norm = self.grad_norm()
        return math.isfinite(norm) and norm >= 0  # DeepSpeed marks a bad norm by −1

    def grad_norm(self) -> float:
        """Global norm of the last update's gradients before clipping: dense² + Σ experts²."""
        return float(self._grad_norm)

    @property
    def lr(self) -> float:
        """The rate of the last layers, which layer decay leaves as it is."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @torch.no_grad()
    def _clip_gradients(self) -> Tensor:
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        dense = [grad for name, grad in gradients.items() if name not in self.expert_names]
        expert = [grad for name, grad in gradients.items() if name in self.expert_names]
        total = torch.nn.utils.get_total_norm(dense).square()
        if expert:
            of_experts = torch.nn.utils.get_total_norm(expert).square()
            total = total + all_reduce_(of_experts, group=self.world.expert)
        norm = total.sqrt()
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(
                [self.parameters[name] for name in gradients], self.clip_norm, norm
            )
        return norm

    # ----------------------------------------------------------------------------------------
    # State by logical name, whatever the stage

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds of masters and moments, each element on one rank only; no copies.

        At ZeRO stage 0 the ranks hold the same and share the work. Persistent buffers are rank 0's.
        A fragment is valid until the next one is asked for.
        """
        for name, start, values in self._parts():
            if values["weight"].numel():
                yield Fragment(name, self._shape(name), start, values)
        if self.world.is_main:
            yield from whole_fragments((n, {"weight": t}) for n, t in self.buffers.items())

    @property
    def saved_bytes(self) -> int:
        """About what this rank's fragments take."""
        each = 4 + (4 if isinstance(self.optimizer, PairedAdamW) else 8)
        total = 0
        for name in self.parameters:
            replicas = self.world.expert_data if name in self.expert_names else self.world
            total += each * math.prod(self._shape(name)) // replicas.size
        return total

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
        """Set masters and moments to what ``read(name, kind, start, stop)`` returns, 1-D.

        Start and stop are elements of the flattened parameter on this rank; each rank reads what it
        holds. The module's own weights and buffers must have been loaded before the engine was
        made; here follow the parts that only the optimizer has.
        """
        self._start_moments(updates)
        for name, start, values in self._parts(to_load=True):
            for kind, target in values.items():
                if target.numel():
                    target.copy_(read(name, kind, start, start + target.numel()))

    def _shape(self, name: str) -> tuple[int, ...]:
        parameter = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: under ZeRO-3

    def _parts(self, to_load: bool = False) -> Iterator[_Part]:
        """This rank's part of every parameter.

        Args:
            to_load: all that this rank needs, not only what it writes, and what is set is kept.
        """
        if self.stage == 0:
            yield from self._parts_of_replicas(to_load)
        elif self.stage == 3:
            yield from self._parts_of_shards(to_load)
        else:
            yield from self._parts_of_partitions()

    def _parts_of_replicas(self, to_load: bool) -> Iterator[_Part]:
        for name, parameter in self.parameters.items():
            part = slice(0, parameter.numel())
            if not to_load:
                replicas = self.world.expert_data if name in self.expert_names else self.world
                size = -(-parameter.numel() // replicas.size)
                part = slice(replicas.rank * size, (replicas.rank + 1) * size)
            moments = moment_views(self.optimizer.state[parameter])
            state = {"weight": parameter.data.view(-1), **moments}
            yield _Part(name, part.start, {kind: t[part] for kind, t in state.items()})

    def _parts_of_partitions(self) -> Iterator[_Part]:
        """ZeRO 1 and 2 cut the concatenation of all parameters."""
        for name, parameter in self.parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # all of it is on other ranks
                continue
            moments = moment_views({k: mapping.get_hp_fragment(k) for k in self._moment_keys})
            start = mapping.lp_fragment_address.start
            yield _Part(name, start, {"weight": mapping.get_hp_fragment(), **moments})

    def _parts_of_shards(self, to_load: bool) -> Iterator[_Part]:
        """ZeRO-3 cuts every parameter."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        zero = self._engine.optimizer
        for index, parameters in enumerate(zero.fp16_groups):
            with self._resident(index, keep=to_load) as flat:
                state = {"weight": flat.data, **moment_views(self.optimizer.state[flat])}
                for parameter in parameters:
                    _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                    start = self.world.rank * size
                    used = min(max(parameter.ds_numel - start, 0), size)  # the rest is padding
                    values = {kind: t[offset : offset + used] for kind, t in state.items()}
                    yield _Part(names[id(parameter)], start, values)

    @contextlib.contextmanager
    def _resident(self, index: int, keep: bool) -> Iterator[Tensor]:
        """ZeRO-3's flat fp32 weights of one sub-group, read from NVMe if that is where they are.

        Args:
            keep: write them back.
        """
        zero = self._engine.optimizer
        swapped = zero._swappable_optimizer_subgroup(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        yield zero.fp32_partitioned_groups_flat[index]
        if swapped and keep:
            zero._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            zero._release_swap_buffers(index)

    def _start_moments(self, updates: int) -> None:
        """Make the optimizer's state before its first step.

        DeepSpeed maps parameters to their moments after the first *group* has stepped, and then
        finds none for the other groups if they are made lazily.
        """
        if self.stage == 3:
            for index in range(len(self._engine.optimizer.fp16_groups)):
                with self._resident(index, keep=True) as flat:
                    start_moments(self.optimizer.state[flat], flat, updates, self._moment_keys)
            return
        for group in self.optimizer.param_groups:
            for flat in group["params"]:  # whole parameters, or ZeRO's parts
                start_moments(self.optimizer.state[flat], flat, updates, self._moment_keys)
        if self.stage > 0:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Release the hooks and buffers that DeepSpeed holds, and its files."""
        if self._nvme_path:
            barrier()
        self._engine.destroy()
        if self._nvme_path and self.world.local_rank == 0:
            shutil.rmtree(self._nvme_path, ignore_errors=True)
