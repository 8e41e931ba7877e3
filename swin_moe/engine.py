"""Config to DeepSpeed: ZeRO, precision, expert groups, clipping. The only file that imports it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from .checkpoint import Fragment, persistent_buffers, whole_fragments
from .config import OptimizerConfig, PrecisionConfig, ZeroConfig
from .distributed import World, all_reduce_
from .models import MoEOutput, SwinTransformer, expert_parameter_names
from .optim import build_optimizer, parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


# What we use of DeepSpeed beyond its documented interface.
_INTERNALS = (
    (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"),
    (deepspeed_groups, "_EXPERT_PARALLEL_GROUP"),
    (deepspeed_groups, "_EXPERT_DATA_PARALLEL_GROUP"),
)


def check_deepspeed() -> None:
    """Raise ``ValueError`` if this DeepSpeed lacks what we use of its internals."""
    for holder, name in _INTERNALS:
        if not hasattr(holder, name):
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} is not supported (it has no {name}): "
                "install the version in requirements/lock.txt"
            )


def cpu_computes_in_bf16() -> bool:
    """Whether this processor has bf16 instructions: AVX512-BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in; ``auto`` is bf16 where the device has instructions for it.

    Raises:
        ValueError: bf16 is asked for on a GPU without it.
    """
    if precision.dtype == "fp32":
        return torch.float32
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision.dtype == "bf16" and not supported:
            raise ValueError("precision.dtype=bf16: this GPU has no bf16; use precision.dtype=fp32")
    else:
        supported = cpu_computes_in_bf16()
    wanted = precision.dtype == "bf16" or supported
    return torch.bfloat16 if wanted else torch.float32


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
        model: SwinTransformer,
        world: World,
        *,
        optimizer: OptimizerConfig,
        zero: ZeroConfig,
        dtype: torch.dtype,
        micro_batch: int,
        accumulation_steps: int,
    ) -> None:
        check_deepspeed()
        self.world = world
        self.model = model
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
        global_batch = micro_batch * accumulation_steps * world.size
        self.optimizer = build_optimizer(groups, optimizer, global_batch)
        # Probing and building DeepSpeed's own ops takes seconds and a compiler; none is used.
        deepspeed.ops.__compatible_ops__ = {}
        settings = self._settings(zero, micro_batch, accumulation_steps)
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
            "overlap_comm": self.world.device.type == "cuda",
        }
        if zero.offload == "cpu":
            stage["offload_optimizer"] = {"device": "cpu"}
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
        self.model.add_module(
            "expert_marker", _ExpertMarker(self.model.moe.num_experts, self.world)
        )

    # ----------------------------------------------------------------------------------------
    # One step

    def forward(self, images: Tensor) -> Tensor | MoEOutput:
        """Images [B, C, H, W] fp32 to the model's output; logits come back in fp32."""
        if self._low_precision_weights:
            images = images.to(self.dtype)
        with self._autocast():
            output = self._engine(images)
        if isinstance(output, MoEOutput):
            return output._replace(logits=output.logits.float())
        return output.float()

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
        """
        for name, parameter in self.parameters.items():
            start, values = self._held(name, parameter)
            if values["weight"].numel():
                yield Fragment(name, self._shape(parameter), start, values)
        if self.world.is_main:
            yield from whole_fragments((n, {"weight": t}) for n, t in self.buffers.items())

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: under ZeRO-3

    def _held(self, name: str, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
        """Where this rank's part of the flattened parameter begins, and its values by kind."""
        if self.stage == 0:
            replicas = self.world.expert_data if name in self.expert_names else self.world
            size = -(-parameter.numel() // replicas.size)
            part = slice(replicas.rank * size, (replicas.rank + 1) * size)
            state = {"weight": parameter.data, **self._moments_of(parameter)}
            return part.start, {kind: t.flatten()[part] for kind, t in state.items()}
        if self.stage == 3:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            start = self.world.rank * size
            used = min(max(parameter.ds_numel - start, 0), size)  # type: ignore[attr-defined]
            state = {"weight": safe_get_local_fp32_param(parameter)}
            for kind in MOMENTS:
                state[kind] = safe_get_local_optimizer_state(parameter, kind)
            return start, {kind: t.flatten()[:used] for kind, t in state.items()}
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # all of it is on other ranks
            return 0, {"weight": torch.empty(0)}
        state = {kind: mapping.get_hp_fragment(kind) for kind in MOMENTS}
        return mapping.lp_fragment_address.start, {"weight": mapping.get_hp_fragment(), **state}

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {kind: self.optimizer.state[parameter][kind] for kind in MOMENTS}

    def _flat_partitions(self) -> list[Tensor]:
        """The tensors by which the optimizer keeps its state: whole parameters, or ZeRO's parts."""
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self.optimizer.param_groups for flat in group["params"]]

    def _start_moments(self, updates: int) -> None:
        """Make the optimizer's state before its first step.

        DeepSpeed maps parameters to their moments after the first *group* has stepped, and then
        finds none for the other groups if they are made lazily.
        """
        for flat in self._flat_partitions():
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.tensor(float(updates)), **moments}
        if self.stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
        """Set masters and moments to what ``read(name, kind, start, stop)`` returns, 1-D.

        Start and stop are elements of the flattened parameter on this rank; each rank reads what it
        holds. The module's own weights and buffers must have been loaded before the engine was
        made; here follow the parts that only the optimizer has.
        """
        self._start_moments(updates)
        for name, parameter in self.parameters.items():
            if self.stage == 0:
                state = {"weight": parameter.data, **self._moments_of(parameter)}
                for kind, target in state.items():
                    target.copy_(read(name, kind, 0, target.numel()).view_as(target))
                continue
            start, held = self._held(name, parameter)
            for kind, target in held.items():
                if target.numel():
                    self._set(parameter, kind, read(name, kind, start, start + target.numel()))

    def _set(self, parameter: nn.Parameter, kind: str, values: Tensor) -> None:
        """Set this rank's part of a parameter, which ZeRO keeps in flat buffers of its own."""
        values = values.to(self.world.device)
        if self.stage == 3:
            padding = parameter.ds_tensor.numel() - values.numel()  # type: ignore[attr-defined]
            values = torch.nn.functional.pad(values, (0, padding))
            if kind == "weight":
                safe_set_local_fp32_param(parameter, values)
            else:
                safe_set_local_optimizer_state(parameter, values, kind)
        else:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            mapping.get_hp_fragment(None if kind == "weight" else kind).copy_(values)

    def close(self) -> None:
        """Release the hooks and buffers that DeepSpeed holds."""
        self._engine.destroy()
