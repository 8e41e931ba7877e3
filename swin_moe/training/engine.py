"""DeepSpeed, for ZeRO, precision, expert groups and clipping; only this file imports it."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Fragment, persistent_buffers
from ..common.deferred import import_uncompiled
from ..config import OptimizerConfig, ZeroConfig
from ..distributed import World, all_reduce_, barrier
from ..distributed.expert_placement import BUCKET, SUB_GROUP
from ..models import Outputs, expert_parameter_names
from ..moe import num_experts
from .engine_state import EngineState
from .loss_scale import LossScale
from .optim import build_optimizer, parameter_groups
from .precision import cast_floating, predictions_in_fp32

# isort: split
# After `distributed`, which sets its accelerator.
import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups

log = logging.getLogger("swin_moe")

# Undocumented parts of DeepSpeed that this file uses.
_INTERNALS = (
    (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"),
    (DeepSpeedZeroOptimizer_Stage3, "_swappable_optimizer_subgroup"),
    (DeepSpeedZeroOptimizer_Stage3, "_optimizer_states_and_gradient_swap_in"),
    (DeepSpeedZeroOptimizer_Stage3, "_optimizer_states_and_gradient_swap_out"),
    (DeepSpeedZeroOptimizer_Stage3, "_release_swap_buffers"),
    (DeepSpeedZeroOptimizer, "_update_scale"),
    (DeepSpeedZeroOptimizer_Stage3, "_update_scale"),
    (deepspeed.zero.Init, "_convert_to_zero_parameters"),
    (deepspeed_groups, "_EXPERT_PARALLEL_GROUP"),
    (deepspeed_groups, "_EXPERT_DATA_PARALLEL_GROUP"),
)


def prepare_nvme(zero: ZeroConfig, world: World) -> None:
    """Build DeepSpeed's async_io, once per node, and make the folder of its files.

    Raises:
        ValueError: libaio, a compiler or the folder is missing.
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


# ZeRO imports Muon's file, whose decorators compile three functions.
import_uncompiled("deepspeed.runtime.zero.muon.original_muon")


def check_deepspeed() -> None:
    """Raise ``ValueError`` if this version of DeepSpeed lacks an internal that this file uses."""
    for holder, name in _INTERNALS:
        if not hasattr(holder, name):
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} is not supported (it has no {name}): "
                "install the version in requirements/lock.txt"
            )


def bucket_size(model: nn.Module) -> int:
    """Return the elements per reduction; ZeRO-1 and 2 need room for the largest parameter."""
    return max(BUCKET, largest_parameter(model))


def largest_parameter(model: nn.Module) -> int:
    """Return the elements of the largest parameter, whether ZeRO-3 has cut it or not."""
    return max(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def cutter(
    zero: ZeroConfig, world: World, dtype: torch.dtype, largest: int
) -> Callable[[list[nn.Parameter]], None]:
    """Return a function that cuts parameters over the ranks as ZeRO-3 does.

    It serves to build a model before there is an :class:`Engine`, such that no rank ever holds the
    whole model. Every rank must cut the same parameters in the same order.

    Args:
        largest: elements of the largest parameter.
    """
    if zero.uses_files:
        prepare_nvme(zero, world)
    deepspeed.ops.__compatible_ops__ = {}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **_offloaded_weights(zero, world, largest)},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    # On a module without parameters; `cut` converts the model's parameters later.
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
        part = -(-largest // world.size)  # elements of the largest parameter on a rank
        settings |= {"nvme_path": zero.nvme_path, "max_in_cpu": 0, "buffer_size": part}
    return {"offload_param": settings}


def reserved_bytes(
    zero: ZeroConfig,
    optimizer: OptimizerConfig,
    model: nn.Module,
    dtype: torch.dtype,
    world: World,
) -> int:
    """Return DeepSpeed's bytes on the device, except weights and gradients in the model's dtype."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    elsewhere = zero.offload_optimizer == "nvme" or (
        zero.offload_optimizer == "cpu" and world.device.type != "cpu"
    )
    moments = 0 if elsewhere else (4 if optimizer.moments == "bf16" else 8) * parameters
    if zero.stage == 0:
        return moments
    masters = 0 if elsewhere else 4 * parameters  # ZeRO-3 copies fp32 weights, too
    # Experts are cut over their replicas only.
    replicas = world.expert_data.size if world.expert.size > 1 else world.size
    return (masters + moments) // replicas + 2 * bucket_size(model) * dtype.itemsize


class _ExpertMarker(MoE):
    """A module that marks the model as having experts: DeepSpeed looks for its own class.

    It has no parameters and is never called.
    """

    def __init__(self, num_experts: int, world: World) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = world.expert.size
        self.num_local_experts = max(num_experts // world.expert.size, 1)  # 1 for a shard
        self.expert_group_name = _group_name(world)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: the groups are those of ``distributed.init``."""


def _group_name(world: World) -> str:
    return f"ep_size_{world.expert.size}"


class Engine:
    """A model under DeepSpeed.

    With an expert group of one rank the experts are ordinary parameters, which any ZeRO stage may
    shard. Otherwise they are reduced over the expert-data group only.

    At ZeRO stage 0, bf16 and fp16 mean autocast over fp32 weights. This class clips the gradients
    there, because DeepSpeed averages the ranks' norms, which does not give the norm of all experts.
    From stage 1 on, weights are bf16 or fp16 with fp32 masters, and DeepSpeed's norm is correct.

    Attributes:
        model: the module inside.
        optimizer: the optimizer whose rates a schedule may set.
        loss_scale: with fp16; losses and gradient norms are given and returned without it.
        deepspeed: DeepSpeed's engine.
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
            prepare_nvme(zero, world)
        self.world = world
        self.model = model
        self._nvme_path = zero.nvme_path if zero.uses_files else ""
        self.stage = zero.stage
        self.dtype = dtype
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        self.clip_norm = optimizer.clip_norm
        experts = expert_parameter_names(model) if world.expert.size > 1 else set()
        self.expert_names = experts
        self.parameters = dict(model.named_parameters())
        buffers = persistent_buffers(model)  # DeepSpeed may replace them
        groups = parameter_groups(model, optimizer.weight_decay, optimizer.layer_decay)
        if experts:
            self._mark_experts(groups)
        global_batch = micro_batch * gradient_accumulation_steps * world.size
        self.optimizer = build_optimizer(groups, optimizer, global_batch)
        # DeepSpeed's own ops are not used; probing and building them takes seconds and a compiler.
        deepspeed.ops.__compatible_ops__ = {}
        settings = self._settings(zero, micro_batch, gradient_accumulation_steps)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        if self.loss_scale and self.stage:
            self.deepspeed.optimizer.loss_scaler = self.loss_scale
        self._grad_norm: Tensor | float = 0.0
        self._state = EngineState(
            world, self.stage, self.deepspeed.optimizer, self.optimizer,
            self.parameters, buffers, experts,
        )  # fmt: skip

    def _settings(self, zero: ZeroConfig, micro_batch: int, accumulation: int) -> dict[str, Any]:
        stage: dict[str, Any] = {
            "stage": zero.stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket_size(self.model) if zero.stage < 3 else BUCKET,
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
            "bf16": {
                "enabled": self._low_precision_weights and self.dtype == torch.bfloat16,
                "check_grad_overflow": True,
            },
            "fp16": {"enabled": self._low_precision_weights and self.dtype == torch.float16},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            # By default it waits for the device before and after each micro-step.
            "timers": {"throughput": {"enabled": False}},
        }

    @property
    def _low_precision_weights(self) -> bool:
        return self.stage > 0 and self.dtype != torch.float32

    def _mark_experts(self, param_groups: list[dict[str, Any]]) -> None:
        """Mark for DeepSpeed which parameters are experts and which ranks replicate them."""
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
        """Call the model with its arguments by name, in fp32; return predictions in fp32."""
        if self._low_precision_weights:
            inputs = cast_floating(inputs, self.dtype)
        with self._autocast():
            outputs: Outputs = self.deepspeed(**inputs)
        return predictions_in_fp32(outputs)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.stage == 0 and self.dtype != torch.float32:
            return torch.autocast(self.world.device.type, dtype=self.dtype)
        return contextlib.nullcontext()

    def train(self, mode: bool = True) -> None:
        self.deepspeed.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the last micro-step reduces them (ZeRO-2 and 3: each does)."""
        if self.loss_scale and self.stage == 0:  # otherwise DeepSpeed asks for the scaled loss
            loss = self.loss_scale.scale_loss(loss)
        self.deepspeed.backward(loss)

    @property
    def at_boundary(self) -> bool:
        """Whether the next :meth:`step` updates the weights."""
        return bool(self.deepspeed.is_gradient_accumulation_boundary())

    def step(self) -> None:
        """Update the weights at the boundary; must be called after every backward pass.

        Raises:
            FloatingPointError: the global gradient norm is not finite; weights and moments are
                unchanged, and training may go on. With fp16, :meth:`lower_loss_scale` is the
                remedy.
        """
        boundary = self.at_boundary
        if boundary and self.stage == 0:
            self._grad_norm = float(self._clip_gradients())  # the host's one wait in an update
            if not self._norm_is_finite():
                for parameter in self.parameters.values():
                    parameter.grad = None  # the optimizer skips these
        self.deepspeed.step()
        if boundary and self.stage > 0:  # DeepSpeed skips a non-finite step itself
            self._grad_norm = float(self.deepspeed.get_global_grad_norm())
        if boundary and not self._norm_is_finite():
            raise FloatingPointError("the gradient norm is not finite")
        if boundary and self.loss_scale:
            self.loss_scale.count()

    def lower_loss_scale(self) -> bool:
        """Lower the loss scale after an overflow; return False if it cannot fall."""
        return self.loss_scale is not None and self.loss_scale.lower()

    def _norm_is_finite(self) -> bool:
        norm = self.grad_norm()
        return math.isfinite(norm) and norm >= 0  # DeepSpeed marks a bad norm by −1

    def grad_norm(self) -> float:
        """Return the last update's global gradient norm before clipping, √(dense² + Σ experts²)."""
        return float(self._grad_norm)

    @property
    def lr(self) -> float:
        """The rate of the last layers, which layer decay does not change."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @torch.no_grad()
    def _clip_gradients(self) -> Tensor:
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        if self.loss_scale:
            torch._foreach_div_(list(gradients.values()), self.loss_scale.value)
        dense = [grad for name, grad in gradients.items() if name not in self.expert_names]
        expert = [grad for name, grad in gradients.items() if name in self.expert_names]
        total = torch.nn.utils.get_total_norm(dense).square()
        if expert:
            experts = torch.nn.utils.get_total_norm(expert).square()
            total = total + all_reduce_(experts, group=self.world.expert)
        norm = total.sqrt()
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(
                [self.parameters[name] for name in gradients], self.clip_norm, norm
            )
        return norm

    # ----------------------------------------------------------------------------------------
    # State by logical name

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of masters and moments, see :meth:`EngineState.fragments`."""
        return self._state.fragments()

    @property
    def saved_bytes(self) -> int:
        """Approximate bytes of this rank's fragments."""
        return self._state.saved_bytes

    def load(self, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
        """Set this rank's part of masters and moments, see :meth:`EngineState.load`."""
        self._state.load(read, updates)

    def close(self) -> None:
        """Release the hooks and buffers that DeepSpeed holds, and its files."""
        if self._nvme_path:
            barrier()
        self.deepspeed.destroy()
        if self._nvme_path and self.world.local_rank == 0:
            shutil.rmtree(self._nvme_path, ignore_errors=True)
