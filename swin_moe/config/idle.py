"""Keys that are set but have no effect, because of another key."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from .architecture import MoEConfig
from .sections import AugmentConfig, Config

Idle = tuple[str, tuple[str, ...]]  # a key, and the keys that have no effect because of it


def idle_keys(config: Config) -> str:
    """Return a line on keys that are set without effect, "" if there are none."""
    defaults = Config()
    moe = _of_moe(config.moe) if config.moe.enabled else ()
    idle = [
        f"{key} with {cause}={attrgetter(cause)(config)}"
        for cause, keys in (*moe, *_of_augment(config.augment), *_of_others(config))
        for key in keys
        if attrgetter(key)(config) != attrgetter(key)(defaults)
    ]
    return f"without effect: {', '.join(idle)}" if idle else ""


def _of_moe(moe: MoEConfig) -> Iterator[Idle]:
    token_choice = ("moe.eval_top_k", "moe.batch_prioritized", "moe.route_per_image",
                    "moe.balance", "moe.aux_loss_weight")  # fmt: skip
    if moe.routing == "token_choice":
        yield "moe.routing", ("moe.slots_per_expert",)
    elif moe.routing == "expert_choice":
        gate = () if moe.gate_after_norm else ("moe.normalize_gate",)
        yield "moe.routing", ("moe.slots_per_expert", *token_choice, *gate)
    else:
        choice = ("moe.top_k", "moe.score", "moe.normalize_gate", "moe.gate_noise")
        capacity = ("moe.capacity_factor", "moe.eval_capacity_factor")
        yield "moe.routing", (*token_choice, *choice, *capacity)
    if moe.router == "linear":
        yield "moe.router", ("moe.cosine_router_dim", "moe.cosine_router_init_t")
    if moe.balance == "none":
        yield "moe.balance", ("moe.aux_loss_weight",)


def _of_augment(augment: AugmentConfig) -> Iterator[Idle]:
    if not (augment.mixup or augment.cutmix):
        yield "augment.mixup", ("augment.mixup_prob", "augment.mixup_switch_prob")
    elif not augment.cutmix:
        yield "augment.cutmix", ("augment.mixup_switch_prob",)
    elif not augment.mixup:
        yield "augment.mixup", ("augment.mixup_switch_prob",)
    policy = augment.auto_augment
    if policy and "3a" not in policy and augment.color_jitter:  # timm's rule
        yield "augment.auto_augment", ("augment.color_jitter",)


def _of_others(config: Config) -> Iterator[Idle]:
    if config.model.family == "swin_mlp":
        yield "model.family", ("model.attn_drop_rate", "model.qkv_bias", "model.qk_scale")
    if config.precision.dtype in ("bf16", "fp16"):
        yield "precision.dtype", ("precision.tf32",)
    if not config.schedule.warmup_epochs:
        yield "schedule.warmup_epochs", ("schedule.warmup_lr",)
    if not config.zero.uses_files:
        yield "zero.offload_optimizer", ("zero.nvme_path",)
    if config.zero.stage == 3:
        yield "zero.stage", ("train.compile",)
    if config.faults.nonfinite == "stop":
        yield "faults.nonfinite", ("faults.max_nonfinite",)
