"""The sections that define a model: backbone and Mixture of Experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from . import kinds
from .kinds import NonNegative, Positive, Section


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


class Architecture(Section):
    """The sections that define a model."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()

    @model_validator(mode="after")
    def _check_blocks(self) -> Architecture:
        check_moe_blocks(self.model, self.moe)
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
