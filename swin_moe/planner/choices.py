"""The ways to lay a config out on a cluster, and what each of them takes: memory, traffic, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace

import numpy as np
import torch

from ..common.hardware import Cluster
from ..common.host import MARGIN
from ..config import Config, ModelConfig, micro_batch_sizes, micro_batches
from ..tasks import build_task
from .flops import Flops, flops
from .memory import Memory, memory
from .states import ParameterGroup, groups_of, spread, states
from .trace import Trace, meta_model, trace
from .traffic import Message, exchanged, traffic

# Of the makers' peaks, what torch's kernels reach in models such as these. They are the roofline's
# only constants, with the time that a GPU needs from one kernel to the next in eager PyTorch.
OF_PRODUCTS, OF_MEMORY, OF_LINKS = 0.6, 0.8, 0.7
LAUNCH = 5e-6  # seconds per op
CLOSE = 1.05  # times within this ratio: the roofline cannot tell them apart
HOST_LINK = 2e10  # bytes/s to host memory, per GPU


@dataclass(frozen=True)
class Choice:
    """A layout of the config on the cluster; together with it, overrides of the config."""

    stage: int
    expert_parallel_size: int
    images: int  # of a micro-batch on each rank
    accumulation: int
    checkpoint: bool | str | list[int]
    offload: str
    offload_param: str = "none"

    @property
    def recomputed(self) -> str:
        """For people: which blocks."""
        if isinstance(self.checkpoint, list):
            return f"{sum(self.checkpoint)} blocks"
        return "all" if self.checkpoint else ""

    def overrides(self) -> list[str]:
        """What to add to the command line."""
        kept = str(self.checkpoint).lower().replace(" ", "")
        keys = [
            f"zero.stage={self.stage}",
            f"zero.offload_optimizer={self.offload}",
            f"zero.offload_param={self.offload_param}",
            f"parallel.expert_parallel_size={self.expert_parallel_size}",
            f"data.batch_size={self.images}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"model.use_checkpoint={kept}",
        ]
        return keys


@dataclass(frozen=True)
class ParallelLayout:
    """A choice with what it takes. Times are seconds of an update."""

    choice: Choice
    memory: Memory
    messages: list[Message]
    compute: float
    exposed: dict[str, float] = field(default_factory=dict)  # communication that nothing hides
    update: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values()) + self.update


class Planner:
    """Lays out one config on clusters of one kind of device; traces are made once.

    Args:
        fused: whether the compiled ops run there.
    """

    def __init__(self, config: Config, cluster: Cluster, fused: bool) -> None:
        self.config, self.cluster, self.fused = config, cluster, fused
        device_has_bf16 = cluster.name not in ("cpu", "v100")
        wanted = config.precision.dtype
        self.bf16 = wanted == "bf16" or (wanted == "auto" and device_has_bf16)
        self.moment_bytes = 4 if config.optimizer.moments == "bf16" else 8
        self._traces: dict[tuple[str, bool, int], Trace] = {}
        self._groups: dict[int, list[ParameterGroup]] = {}

    # ----------------------------------------------------------------------------------------

    def asked(self) -> Choice:
        """What the config says; ``auto`` becomes what a start would make of it."""
        config, cluster = self.config, self.cluster
        size = config.parallel.expert_parallel_size
        if size == "auto":
            shardable = config.moe.enabled and config.zero.stage < 3
            size = int(np.gcd.reduce([cluster.per_node, cluster.size, config.moe.num_experts]))
            size = size if shardable else 1
        steps = config.train.gradient_accumulation_steps
        images, steps = config.data.batch_size, 1 if steps == "auto" else steps
        if config.data.global_batch:
            images, steps = micro_batches(config, cluster.size)
        return Choice(
            config.zero.stage,
            size,
            images,
            steps,
            config.model.use_checkpoint,
            config.zero.offload_optimizer,
            config.zero.offload_param,
        )

    def alternatives(self) -> Iterator[Choice]:
        """Every way that keeps the global batch."""
        asked = self.asked()
        whole = asked.images * asked.accumulation
        sizes = micro_batch_sizes(self.config, whole)
        for checkpoint in (False, True):
            for group in self._expert_groups(asked):
                for stage in (1, 2, 3) if self.cluster.size > 1 else (1, 3):
                    if stage == 3 and group > 1:
                        continue
                    for images in sizes:
                        for offload in ("none", "cpu"):
                            yield Choice(stage, group, images, whole // images, checkpoint, offload)

    def _expert_groups(self, asked: Choice) -> list[int]:
        if not self.config.moe.enabled:
            return [1]
        experts, cluster = self.config.moe.num_experts, self.cluster
        groups = {1, asked.expert_parallel_size}
        for size in range(2, min(experts, cluster.size) + 1):
            fits = cluster.per_node % size == 0 or size % cluster.per_node == 0
            if fits and experts % size == 0 and cluster.size % size == 0:
                groups.add(size)
        return sorted(groups)

    # ----------------------------------------------------------------------------------------

    def lay_out(self, choice: Choice, cluster: Cluster | None = None) -> ParallelLayout:
        """What a choice takes on a cluster of the same device."""
        cluster = cluster or self.cluster
        groups = spread(
            self.groups(choice.expert_parallel_size), cluster.size, choice.expert_parallel_size
        )
        traced = self.traced(choice)
        accelerator = cluster.name != "cpu"
        held = states(
            groups,
            stage=choice.stage,
            bf16=self.bf16,
            offload=choice.offload,
            accelerator=accelerator,
            accumulates=choice.accumulation > 1,
            moment_bytes=self.moment_bytes,
            weights_away=choice.offload_param != "none",
        )
        expert_elements = sum(g.elements for g in groups if g.expert)
        scale = expert_elements / traced.expert_elements if traced.expert_elements else 1.0
        taken = memory(
            traced,
            held,
            images=choice.images,
            accumulates=choice.accumulation > 1,
            gradient_width=2 if self.bf16 and choice.stage else 4,
            expert_scale=scale,
            offloaded_per_image=self._block_inputs() if choice.checkpoint == "offload" else 0,
            margin=int(MARGIN * cluster.memory),
        )
        messages = self.messages(choice, cluster)
        forward, backward = self._compute(traced, choice, cluster)
        exposed = self._exposed(messages, choice, cluster, backward, forward)
        part = sum(g.part if choice.stage else g.elements for g in groups)
        rate = HOST_LINK if choice.offload != "none" else OF_MEMORY * cluster.device.hbm
        # Masters, moments and gradients are read, the first two are written, and the weights.
        update = part * (2 * (4 + self.moment_bytes) + 4 + 2) / rate
        compute = choice.accumulation * (forward + backward)
        return ParallelLayout(choice, taken, messages, compute, exposed, update)

    def messages(self, choice: Choice, cluster: Cluster | None = None) -> list[Message]:
        """What a rank hands to collectives in an update."""
        cluster = cluster or self.cluster
        size = choice.expert_parallel_size
        model = self._model(choice)
        of_states = traffic(
            spread(self.groups(size), cluster.size, size),
            stage=choice.stage,
            bf16=self.bf16,
            accumulation=choice.accumulation,
        )
        return of_states + exchanged(
            model,
            self.config.moe,
            expert_parallel_size=size,
            images=choice.images,
            bf16=self.bf16,
            accumulation=choice.accumulation,
            padded=cluster.name != "cpu",
        )

    def groups(self, expert_parallel_size: int) -> list[ParameterGroup]:
        if expert_parallel_size not in self._groups:
            optimizer = self.config.optimizer
            model = meta_model(build_task(self.config), expert_parallel_size)
            self._groups[expert_parallel_size] = groups_of(
                model, optimizer.weight_decay, optimizer.layer_decay
            )
        return self._groups[expert_parallel_size]

    def traced(self, choice: Choice) -> Trace:
        """One for all expert groups: what differs among them is the number of experts."""
        autocast = self.bf16 and choice.stage == 0
        group, recompute = choice.expert_parallel_size, str(choice.checkpoint)
        if group > 1:
            known = [g for c, a, g in self._traces if (c, a) == (recompute, autocast)]
            group = max([g for g in known if g > 1], default=group)
        key = (recompute, autocast, group)
        if key not in self._traces:
            model = self._model(choice)
            if choice.checkpoint == "offload":  # to where: the device's account is the same
                model = model.model_copy(update={"use_checkpoint": True})
            self._traces[key] = trace(
                build_task(self.config.model_copy(update={"model": model})),
                dtype=torch.bfloat16 if self.bf16 else torch.float32,
                autocast=autocast,
                expert_parallel_size=group,
                fused=self.fused,
                padded=group > 1 and self.cluster.name != "cpu",
            )
        return self._traces[key]

    def flops(self, choice: Choice) -> Flops:
        """Of a rank's micro-batch: each computes as many rows, whosever they are."""
        return flops(self._model(choice), self.config.moe, choice.images)

    def _model(self, choice: Choice) -> ModelConfig:
        return self.config.model.model_copy(update={"use_checkpoint": choice.checkpoint})

    def _block_inputs(self) -> int:
        model, total = self.config.model, 0
        height, width = model.token_grid
        for stage, depth in enumerate(model.depths):
            tokens = -(-height // 2**stage) * -(-width // 2**stage)
            total += (depth - 1) * tokens * (model.embed_dim << stage)
        return total * (2 if self.bf16 else 4)

    def _compute(self, traced: Trace, choice: Choice, cluster: Cluster) -> tuple[float, float]:
        """Seconds of a forward and of a backward pass, op by op."""
        device = cluster.device
        peak = device.bf16 if self.bf16 else device.fp32
        products = traced.flops.at(choice.images) / (peak * OF_PRODUCTS)
        moves = traced.moved.at(choice.images) / (device.hbm * OF_MEMORY)
        launch = LAUNCH if cluster.name != "cpu" else 0.0
        each = np.maximum(np.maximum(products, moves), launch)
        forward = float(each[: traced.forward_ops].sum())
        return forward, float(each.sum()) - forward

    def _exposed(
        self,
        messages: list[Message],
        choice: Choice,
        cluster: Cluster,
        backward: float,
        forward: float,
    ) -> dict[str, float]:
        """Communication less what is under way during computation, by what it carries."""
        group, world = choice.expert_parallel_size, cluster.size
        shape = {
            "world": (world, 1),
            "expert": (group, 1),
            "expert_data": (world // group, group),
        }
        exposed: dict[str, float] = {}
        # Gradients are under way during the backward pass (ZeRO-1: the last one), ZeRO-3's weights
        # during both.
        steps = choice.accumulation if choice.stage >= 2 else 1
        hidden = steps * (backward + (forward if choice.stage == 3 else 0.0))
        for message in messages:
            took = cluster.seconds(message.kind, message.sent, *shape[message.group]) / OF_LINKS
            if message.overlaps:
                free = min(hidden, took)
                hidden, took = hidden - free, took - free
            exposed[message.what] = exposed.get(message.what, 0.0) + took
        return exposed


def fits(layout: ParallelLayout, cluster: Cluster) -> bool:
    return layout.memory.total <= cluster.memory


def rank_layouts(planner: Planner, asked: ParallelLayout, cluster: Cluster) -> list[ParallelLayout]:
    """The best of each ZeRO stage, expert group, checkpointing and offload, and the config's own.

    The one to take comes first, see :func:`_to_take`, then the fastest. Where none of a kind fits,
    its smallest micro-batch stands for it; those come last. One more recomputes only some of the
    blocks, where that may be the fastest.
    """
    best: dict[tuple[object, ...], ParallelLayout] = {}
    for choice in planner.alternatives():
        key = tuple(replace(choice, images=0, accumulation=0).__dict__.values())
        known = best.get(key)
        if known is not None and fits(known, cluster) and known.choice.images > 4 * choice.images:
            continue  # ever smaller micro-batches are ever slower
        layout = planner.lay_out(choice)
        order = _order(layout, cluster)
        if known is None or order < _order(known, cluster):
            best[key] = layout
    ranked = sorted(best.values(), key=lambda layout: _order(layout, cluster))
    spared = _recompute_less(planner, ranked, cluster)
    more = [] if spared is None else [spared]
    if fits(asked, cluster) and all(asked.choice != layout.choice for layout in ranked + more):
        more.append(asked)
    ranked = sorted(ranked + more, key=lambda layout: _order(layout, cluster))
    first = _to_take(ranked, asked.choice, cluster)
    return [first, *(layout for layout in ranked if layout is not first)]


def _to_take(ranked: list[ParallelLayout], asked: Choice, cluster: Cluster) -> ParallelLayout:
    """The config as it is, if no layout is clearly faster; else the simplest of the fastest ones.

    That is the lowest ZeRO stage, then what changes least of the config, then the fastest.
    """
    close = [
        layout
        for layout in ranked
        if fits(layout, cluster) and layout.seconds <= CLOSE * ranked[0].seconds
    ]

    def changes(layout: ParallelLayout) -> tuple[bool, int, int, float]:
        choice = layout.choice
        changed = sum(a != b for a, b in zip(astuple(choice), astuple(asked), strict=True))
        return changed > 0, choice.stage, changed, layout.seconds

    return min(close, key=changes, default=ranked[0])


def _recompute_less(
    planner: Planner, ranked: list[ParallelLayout], cluster: Cluster
) -> ParallelLayout | None:
    """The fastest layout that recomputes all blocks, with as few of them as still fit.

    Blocks of early stages come first: all cost about as much to repeat, and each stage's keep half
    of what those of the stage before keep.

    Returns:
        None where even without recomputing it would not beat the layouts there are, and where all
        of the blocks are needed.
    """
    whole = next((one for one in ranked if one.choice.checkpoint and fits(one, cluster)), None)
    if whole is None:
        return None
    without = planner.lay_out(replace(whole.choice, checkpoint=False))
    if fits(without, cluster) or without.seconds >= ranked[0].seconds:
        return None
    depths = planner.config.model.depths
    best, low, high = None, 0, sum(depths)  # low blocks are too few, high are enough
    while high - low > 1:
        middle = (low + high) // 2
        layout = planner.lay_out(replace(whole.choice, checkpoint=_first(middle, depths)))
        if fits(layout, cluster):
            best, high = layout, middle
        else:
            low = middle
    return best


def _first(blocks: int, depths: list[int]) -> list[int]:
    """So many blocks, from the first stage on, as counts of each stage."""
    before = np.cumsum([0, *depths[:-1]])
    return [int(count) for count in np.clip(blocks - before, 0, depths)]


def _order(layout: ParallelLayout, cluster: Cluster) -> tuple[bool, float]:
    fitting = fits(layout, cluster)
    return not fitting, layout.seconds if fitting else float(layout.memory.total)
