"""The sections of a configuration: keys, their defaults, and checks between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from . import kinds
from .architecture import Architecture
from .kinds import NonNegative, NonNegativeFloat, Positive, Rate, Section
from .tasks import ClassificationConfig, TaskConfig


class DataConfig(Section):
    """The data. ``path`` is a folder, tar shards or the name of a bundled sample."""

    path: kinds.RequiredPath = "fashion_mnist"
    train: kinds.RequiredPath = "train"  # sub-folder, or prefix of the shards' names
    val: kinds.RequiredPath = "val"
    # Match the samples' classes with the model's by their names or by their numbers.
    match_classes: Literal["name", "number"] = "name"
    # Images per process and micro-step, see train.gradient_accumulation_steps.
    batch_size: kinds.Images = 128
    # Images per update on any number of processes; it sets the micro-steps. 0 = not fixed.
    global_batch: kinds.ImagesOrNone = 0
    eval_batch_size: kinds.ImagesOrNone = 0  # 0 = batch_size
    num_workers: kinds.Workers = 4
    # 0 = shuffle all samples in each epoch. On network disks: shuffle the shards, and then samples
    # within windows of this size, so that only few shards are read at a time.
    shuffle_window: NonNegative = 0
    # Share of an epoch's images that may be unreadable; more stop the run. Ten are always allowed.
    max_bad_share: Rate = 0.001
    # Pixels of the largest image that is read. The default takes 0.5 GB of memory as RGB.
    max_pixels: Positive = 178_956_970
    mean: list[Annotated[float, Field(ge=-1e6, le=1e6)]] = [0.485, 0.456, 0.406]
    std: list[Annotated[float, Field(ge=1e-6, le=1e6)]] = [0.229, 0.224, 0.225]

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}")
        return self


class AugmentConfig(Section):
    """Training augmentation, through timm; evaluation resizes and crops the centre."""

    scale: list[Annotated[float, Field(ge=1e-4, le=1)]] = [0.08, 1.0]  # area of the random crop
    ratio: list[Annotated[float, Field(ge=0.01, le=100)]] = [3 / 4, 4 / 3]
    hflip: Rate = 0.5
    color_jitter: kinds.Weight = 0.4
    auto_augment: str = "rand-m9-mstd0.5-inc1"  # empty = none
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    random_erase: Rate = 0.25
    # Repeated augmentation: copies of each image, in an epoch of unchanged length.
    repeats: kinds.Size = 1
    mixup: kinds.Weight = 0.8
    cutmix: kinds.Weight = 1.0
    mixup_prob: Rate = 1.0
    mixup_switch_prob: Rate = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    eval_crop: Annotated[float, Field(ge=0.05, le=1)] = 0.875

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or pair[0] > pair[1]:
                raise ValueError(f"{name}={pair} must be [low, high]")
        return self


REFERENCE_BATCH = 512  # images per update to which base_lr, warmup_lr and min_lr refer


class OptimizerConfig(Section):
    """AdamW. The peak rate is ``base_lr`` × global batch / 512, as in the Swin recipes.

    ``moments`` is the dtype in which both moments are stored; they are computed in fp32, and
    masters are always fp32.
    """

    base_lr: Annotated[float, Field(gt=0)] = 5e-4
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: kinds.Weight = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # rate × this per layer below the head
    clip_norm: NonNegativeFloat = 5.0  # 0 = no clipping
    moments: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas} must be two numbers")
        return self


class ScheduleConfig(Section):
    """Cosine decay per update after a linear warm-up; rates scale like ``optimizer.base_lr``."""

    epochs: Positive = 300
    warmup_epochs: NonNegativeFloat = 20
    warmup_lr: NonNegativeFloat = 5e-7
    min_lr: NonNegativeFloat = 5e-6

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} is more than epochs={self.epochs}"
            )
        return self


class TrainConfig(Section):
    """A run.

    ``gradient_accumulation_steps`` is the number of micro-batches of an update. With ``auto``, each
    process computes ``data.batch_size`` images per update, in the fewest micro-batches that fit
    into its memory. Rates and the order of samples then do not depend on the machine.

    ``compile`` makes graphs of the blocks by torch.compile before training; ``auto`` keeps them
    where they are faster.
    """

    output: kinds.OptionalPath = ""  # run directory; empty = runs/<name of the config file>
    seed: kinds.Seed = 0
    gradient_accumulation_steps: Positive | Literal["auto"] = 1
    eval_every_epochs: Positive = 1
    max_steps: NonNegative = 0  # stop after this number of updates; 0 = run all epochs
    deterministic: bool = False  # only ops that give the same bits each time; fail at others
    compile: bool | Literal["auto"] = False
    profile: bool = False  # trace a few updates into profile/ and split their time

    @property
    def micro_steps(self) -> int:
        """``gradient_accumulation_steps`` as a number; ``auto`` must have been resolved."""
        if self.gradient_accumulation_steps == "auto":
            raise ValueError("gradient_accumulation_steps=auto has not been resolved")
        return self.gradient_accumulation_steps


class ParallelConfig(Section):
    """The placement of experts on ranks.

    ``expert_parallel_size`` is the number of consecutive ranks that hold each expert once; if it
    exceeds the number of experts, several ranks hold parts of one. ``auto`` is the largest number
    that divides the processes of a node and the experts. ``hierarchical_all_to_all`` exchanges
    rows within nodes first, then across; ``auto`` does so if the ranks are on several nodes.
    """

    expert_parallel_size: kinds.Size | Literal["auto"] = 1
    hierarchical_all_to_all: bool | Literal["auto"] = "auto"


class ZeroConfig(Section):
    """DeepSpeed's ZeRO: its stage, and the place of masters, moments and weights."""

    stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"  # to host memory, or to files
    offload_param: Literal["none", "cpu", "nvme"] = "none"  # ZeRO-3: the model's weights, too
    nvme_path: kinds.OptionalPath = ""  # a folder on a fast disk of each node, for nvme

    @model_validator(mode="after")
    def _check(self) -> ZeroConfig:
        if self.offload_optimizer == "cpu" and self.stage == 0:
            raise ValueError("offload_optimizer=cpu needs zero.stage 1, 2 or 3")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ValueError("offload_optimizer=nvme needs zero.stage=3")
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError(f"offload_param={self.offload_param} needs zero.stage=3")
        if self.offload_param != "none" and self.offload_optimizer == "none":
            raise ValueError(
                f"offload_param={self.offload_param} needs zero.offload_optimizer=cpu or nvme, for "
                "masters and moments are larger than weights"
            )
        for key in ("offload_optimizer", "offload_param"):
            if getattr(self, key) == "nvme" and not self.nvme_path:
                raise ValueError(f"{key}=nvme needs zero.nvme_path, a folder on a fast local disk")
        return self

    @property
    def uses_files(self) -> bool:
        """Whether ZeRO keeps files below ``nvme_path``."""
        return "nvme" in (self.offload_optimizer, self.offload_param)


class PrecisionConfig(Section):
    # auto = bf16 where the device computes in it, otherwise fp16 on GPUs from V100 on, or fp32.
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tf32: bool = False  # fp32 on a GPU: faster products, with 10 bits of mantissa
    flush_denormals: bool = True


class CheckpointConfig(Section):
    every_epochs: Positive = 1
    every_steps: NonNegative = 0  # also within an epoch; 0 = only at its end
    keep_last: Positive = 2  # in addition to the best one


class FaultsConfig(Section):
    """The reaction of a run to faults.

    An update with NaN or infinity in its loss, tokens or gradients is never made. With
    ``nonfinite: skip`` the run stops after ``max_nonfinite`` skipped updates in a row; with
    ``rollback`` it then goes back to the last checkpoint and continues with later samples; with
    ``stop`` it stops at the first. A loss ``spike_sigmas`` standard deviations above the running
    mean is reported with its samples; 0 = never. After ``hang_timeout_s`` without progress each
    rank writes its stacks to its log and ends, for the launcher to restart; 0 = wait for ever. Each
    part of the start may take twice as long.
    """

    nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    max_nonfinite: Positive = 10
    spike_sigmas: NonNegativeFloat = 8.0
    hang_timeout_s: kinds.Seconds = 300.0


class LogConfig(Section):
    every_steps: Positive = 10
    tensorboard: bool = True


class OpsConfig(Section):
    fused: bool = True  # false: every op runs its PyTorch reference, to debug the kernels
    require_fused: bool = False  # fail instead of using a PyTorch reference


class Config(Architecture):
    """The whole configuration."""

    task: TaskConfig = ClassificationConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    log: LogConfig = LogConfig()
    ops: OpsConfig = OpsConfig()

    @property
    def mixes_pairs(self) -> bool:
        """Whether images are mixed in pairs, so that micro-batches must be even."""
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
        return mixes and self.task.mixes_images

    @model_validator(mode="after")
    def _check(self) -> Config:
        size = self.parallel.expert_parallel_size
        experts, group = self.moe.num_experts, 1 if size == "auto" else size
        if not self.moe.enabled and group > 1:
            raise ValueError(
                f"parallel.expert_parallel_size={group} needs MoE blocks, but moe.blocks is empty"
            )
        if experts % group and group % experts:
            raise ValueError(
                f"moe.num_experts={experts} is not divisible by "
                f"parallel.expert_parallel_size={group}, nor the other way round"
            )
        if self.zero.stage == 3 and group > 1:
            raise ValueError(
                f"zero.stage=3 with parallel.expert_parallel_size={group} is not supported: use "
                "parallel.expert_parallel_size=1 (ZeRO-3 then shards the experts) or zero.stage=2"
            )
        if self.zero.stage == 3 and self.train.compile is True:
            raise ValueError("train.compile=true needs zero.stage 0, 1 or 2")
        if self.mixes_pairs and self.data.batch_size % 2:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is odd, but mixup and cutmix need pairs: "
                "make it even, or set augment.mixup=0 augment.cutmix=0"
            )
        if len(self.data.mean) != self.model.in_chans:
            raise ValueError(
                f"data.mean has {len(self.data.mean)} channels, "
                f"model.in_chans is {self.model.in_chans}"
            )
        return self
