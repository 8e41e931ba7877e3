"""The sections of a configuration: all keys, their defaults, and checks between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from . import kinds
from .kinds import NonNegative, NonNegativeFloat, Positive, Rate, Section
from .tasks import ClassificationConfig, TaskConfig


class ModelConfig(Section):
    """The backbone; names are those of the official constructors."""

    name: str = "swinv2"
    family: Literal["swin", "swinv2", "swin_mlp", "swin_moe"] = "swinv2"
    img_size: kinds.Size | Annotated[list[kinds.Size], Field(min_length=2, max_length=2)] = 256
    patch_size: kinds.Size = 4
    in_chans: kinds.Size = 3
    num_classes: kinds.Classes = 1000
    embed_dim: kinds.Size = 96
    depths: Annotated[list[kinds.Size], Field(min_length=1, max_length=16)] = [2, 2, 6, 2]
    num_heads: list[kinds.Size] = [3, 6, 12, 24]
    window_size: kinds.Size = 8
    mlp_ratio: kinds.PositiveFactor = 4.0
    mlp_fc2_bias: bool = True  # of dense feed-forwards; experts have moe.fc2_bias
    qkv_bias: bool = True
    qk_scale: kinds.PositiveFactor | None = None  # None = head_dim^-0.5; not for swinv2
    drop_rate: kinds.DropRate = 0.0
    attn_drop_rate: kinds.DropRate = 0.0
    drop_path_rate: kinds.DropRate = 0.1
    ape: bool = False
    patch_norm: bool = True
    pretrained_window_sizes: list[kinds.SizeOrNone] = []
    init_std: kinds.Deviation = 0.02  # of Linear layers; experts have moe.init_std
    extra_norm_every_n_blocks: NonNegative = 0  # on the main branch, as in Swin V2 H and G
    # Compute each block again in the backward pass, or that number of each stage's first blocks.
    # offload: also keep their inputs in host memory until then.
    use_checkpoint: bool | Literal["offload"] | list[NonNegative] = False
    # Windows whose attention matrices exist at a time; the backward pass computes them again.
    # 0 = all windows. The kernels need no matrices: it concerns the reference alone.
    attention_chunk: NonNegative = 0
    # Weights to start from, in any format that `swin-moe convert` reads.
    pretrained: kinds.OptionalPath = ""

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.img_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the first stage in tokens."""
        height, width = self.image_sides
        return -(-height // self.patch_size), -(-width // self.patch_size)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        stages = len(self.depths)
        if self.family == "swinv2" and self.qk_scale is not None:
            raise ValueError("qk_scale has no meaning in swinv2, whose cosine attention learns it")
        if self.family in ("swin", "swin_mlp") and any(self.pretrained_window_sizes):
            raise ValueError(f"pretrained_window_sizes has no meaning in family={self.family}")
        if len(self.num_heads) != stages:
            raise ValueError(f"num_heads has {len(self.num_heads)} stages, depths has {stages}")
        if len(self.pretrained_window_sizes) not in (0, stages):
            raise ValueError(f"pretrained_window_sizes must be empty or have {stages} entries")
        self._check_checkpoint()
        if self.attention_chunk and self.family == "swin_mlp":
            raise ValueError("attention_chunk has no meaning in family=swin_mlp: no attention")
        for stage, heads in enumerate(self.num_heads):
            if (self.embed_dim << stage) % heads:
                raise ValueError(
                    f"num_heads[{stage}]={heads} does not divide the stage's width "
                    f"{self.embed_dim << stage}"
                )
        return self

    def _check_checkpoint(self) -> None:
        counts = self.use_checkpoint
        if not isinstance(counts, list):
            return
        if len(counts) != len(self.depths):
            raise ValueError(
                f"use_checkpoint has {len(counts)} stages, depths has {len(self.depths)}"
            )
        for stage, (count, depth) in enumerate(zip(counts, self.depths, strict=True)):
            if count > depth:
                raise ValueError(
                    f"use_checkpoint[{stage}]={count}, but the stage has {depth} blocks"
                )

    def recomputed_blocks(self, stage: int) -> int:
        """Return the number of a stage's first blocks that the backward pass computes again."""
        if isinstance(self.use_checkpoint, list):
            return self.use_checkpoint[stage]
        return self.depths[stage] if self.use_checkpoint else 0


class MoEConfig(Section):
    """Mixture-of-Experts feed-forward; ``blocks`` lists the MoE block indices of each stage."""

    blocks: list[list[NonNegative]] = []
    num_experts: kinds.Size = 8
    num_shared_experts: kinds.SizeOrNone = 0  # dense experts of all tokens, in addition
    routing: Literal["token_choice", "expert_choice", "soft"] = "token_choice"
    router: Literal["linear", "cosine"] = "linear"  # soft routing has its own
    cosine_router_dim: kinds.Size = 256
    cosine_router_init_t: kinds.PositiveFactor = 0.5
    score: Literal["softmax", "sigmoid"] = "softmax"
    top_k: Positive = 1
    eval_top_k: NonNegative = 0  # 0 = top_k
    slots_per_expert: kinds.Size = 1  # per image, with soft routing
    capacity_factor: kinds.Factor = 1.25  # 0 = dropless
    eval_capacity_factor: kinds.Factor = 0.0  # dropless, see docs/moe.md
    route_per_image: bool = False  # token choice: each image has its own queues and capacity
    batch_prioritized: bool = True
    normalize_gate: bool = False
    gate_after_norm: bool = False  # otherwise the norm of post-norm blocks undoes an only gate
    gate_noise: kinds.Weight = 1.0
    balance: Literal["none", "importance_load", "gshard"] = "importance_load"  # token choice only
    aux_loss_weight: kinds.Weight | list[kinds.Weight] = 0.01  # or one per MoE layer
    z_loss_weight: kinds.Weight = 0.0
    expert_bias_update_rate: kinds.Weight = 0.0  # balance without a loss; DeepSeek-V3 has 0.001
    fc2_bias: bool = True
    init_std: kinds.Deviation = 0.02
    drop_rate: kinds.DropRate = 0.0
    overlap_degree: kinds.Size | Literal["auto"] = 1  # chunks, sent while others are computed
    backend: Literal["fused", "tutel"] = "fused"

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        for key in ("top_k", "eval_top_k"):
            if getattr(self, key) > self.num_experts:
                raise ValueError(
                    f"{key}={getattr(self, key)} is more than num_experts={self.num_experts}"
                )
        self._check_balance()
        if self.routing == "expert_choice" and self.capacity_factor == 0:
            raise ValueError(
                "routing=expert_choice needs capacity_factor > 0: there is no dropless"
            )
        if self.gate_after_norm and (self.routing == "soft" or self.num_shared_experts):
            raise ValueError(
                "gate_after_norm has no meaning with routing=soft or num_shared_experts > 0, where "
                "the norm cannot undo the gate"
            )
        if self.routing == "soft" and self.router == "cosine":
            raise ValueError("routing=soft has its own router: leave out router=cosine")
        return self

    def _check_balance(self) -> None:
        if self.routing != "token_choice" and self.expert_bias_update_rate > 0:
            raise ValueError(
                f"expert_bias_update_rate has no meaning with routing={self.routing}, whose loads "
                "are even"
            )
        if self.routing == "soft" and self.z_loss_weight > 0:
            raise ValueError("z_loss_weight has no meaning with routing=soft")
        weighted = self.aux_loss_weight not in (0, [])
        if self.routing != "token_choice" or self.balance != "importance_load" or not weighted:
            return
        if self.gate_noise == 0:
            raise ValueError("balance=importance_load needs gate_noise > 0 (or use balance=gshard)")
        if self.score == "sigmoid":
            raise ValueError("balance=importance_load needs score=softmax (or use balance=gshard)")

    @property
    def enabled(self) -> bool:
        """Whether any block is an MoE block."""
        return any(self.blocks)

    @property
    def routes_images_apart(self) -> bool:
        """Whether each image is routed on its own."""
        return self.route_per_image or self.routing != "token_choice"

    @property
    def layer_aux_loss_weight(self) -> float:
        """The weight in the config of one layer, see :meth:`of_block`."""
        if isinstance(self.aux_loss_weight, list):
            raise ValueError("aux_loss_weight: a single layer has one weight, not a list")
        return self.aux_loss_weight

    def of_block(self, stage: int, block: int) -> MoEConfig:
        """Return the config of one MoE layer, with its own balance weight."""
        weight = self.aux_loss_weight
        if isinstance(weight, list):
            layers = [(i, j) for i, blocks in enumerate(self.blocks) for j in sorted(blocks)]
            weight = weight[layers.index((stage, block))]
        return self.model_copy(update={"aux_loss_weight": float(weight)})


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
    """

    output: kinds.OptionalPath = ""  # run directory; empty = runs/<name of the config file>
    seed: kinds.Seed = 0
    gradient_accumulation_steps: Positive | Literal["auto"] = 1
    eval_every_epochs: Positive = 1
    max_steps: NonNegative = 0  # stop after this number of updates; 0 = run all epochs
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
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto = bf16 where the device computes in it
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
    allow_unverified: bool = False  # use CUDA kernels that have not yet run on this architecture


class Architecture(Section):
    """The sections that define a model."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()

    @model_validator(mode="after")
    def _check_blocks(self) -> Architecture:
        check_moe_blocks(self.model, self.moe)
        return self


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


def check_moe_blocks(model: ModelConfig, moe: MoEConfig) -> None:
    """Raise ``ValueError`` if ``moe.blocks`` names a stage or block that the model lacks."""
    layers = sum(len(blocks) for blocks in moe.blocks)
    if isinstance(moe.aux_loss_weight, list) and layers and len(moe.aux_loss_weight) != layers:
        raise ValueError(
            f"moe.aux_loss_weight has {len(moe.aux_loss_weight)} weights, moe.blocks has {layers} "
            "MoE layers"
        )
    if moe.gate_after_norm and moe.enabled and model.family != "swinv2":
        raise ValueError(
            f"moe.gate_after_norm needs the post-norm blocks of family=swinv2, not {model.family}"
        )
    if len(moe.blocks) > len(model.depths):
        raise ValueError(
            f"moe.blocks has {len(moe.blocks)} stages, model.depths has {len(model.depths)}"
        )
    for stage, blocks in enumerate(moe.blocks):
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"moe.blocks[{stage}]={blocks} names a block twice")
        for block in blocks:
            if block >= model.depths[stage]:
                raise ValueError(
                    f"moe.blocks[{stage}] names block {block}, but stage {stage} has "
                    f"{model.depths[stage]} blocks (0 to {model.depths[stage] - 1})"
                )
