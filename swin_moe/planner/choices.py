"""Lays a config out on a cluster in all ways, and ranks the layouts by memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace

import numpy as np

from ..common.hardware import Cluster
from ..common.host import MARGIN
from ..config import Config, ModelConfig, micro_batch_sizes, micro_batches
from ..tasks import build_task
from ..training.precision import DTYPES
from .flops import Flops, flops
from .memory import Memory, memory
from .states import ParameterGroup, groups_of, spread, states
from .trace import Trace, meta_model, trace
from .traffic import Message, exchanged, traffic

# The roofline's constants: the shares of the makers' peaks that torch's kernels reach in such
# models, and the time of a GPU from one kernel to the next in eager PyTorch.
OF_PRODUCTS, OF_MEMORY, OF_LINKS = 0.6, 0.8, 0.7
LAUNCH = 5e-6  # seconds per op
CLOSE = 1.05  # the roofline does not resolve times within this ratio
HOST_LINK = 2e10  # bytes/s to host memory, per GPU


@dataclass(frozen=True)
class Choice:
    """A layout of the config on the cluster, which overrides keys of the config."""

    stage: int
    expert_parallel_size: int
    images: int  # of a rank's micro-batch
    accumulation: int
    checkpoint: bool | str | list[int]
    offload: str
    offload_param: str = "none"

    @property
    def recomputed(self) -> str:
        """The recomputed blocks, as text."""
        if isinstance(self.checkpoint, list):
            return f"{sum(self.checkpoint)} blocks"
        return "all" if self.checkpoint else ""

    def overrides(self) -> list[str]:
        """Return the overrides for the command line."""
        kept = str(self.checkpoint).lower().replace(" ", "")
        return [
            f"zero.stage={self.stage}",
            f"zero.offload_optimizer={self.offload}",
            f"zero.offload_param={self.offload_param}",
            f"parallel.expert_parallel_size={self.expert_parallel_size}",
            f"data.batch_size={self.images}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"model.use_checkpoint={kept}",
        ]


@dataclass(frozen=True)
class ParallelLayout:
    """A choice with its memory, messages and times.

    Attributes:
        choice: of the layout.
        memory: of a rank.
        messages: of a rank in an update.
        compute: seconds of an update.
        exposed: seconds of communication that computation does not hide, by its content.
        update: seconds of the optimizer.
    """

    choice: Choice
    memory: Memory
    messages: list[Message]
    compute: float
    exposed: dict[str, float] = field(default_factory=dict)
    update: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values()) + self.update


class Planner:
    """A planner of one config on clusters of one kind of device; it keeps its traces.

    Args:
        config: to lay out.
        cluster: of the run.
        fused: the compiled ops run there.
    """

    def __init__(self, config: Config, cluster: Cluster, fused: bool) -> None:
        self.config, self.cluster, self.fused = config, cluster, fused
        self.dtype: str = config.precision.dtype
        if self.dtype == "auto":
            low = "bf16" if cluster.device.has_bf16 else "fp16"
            self.dtype = "fp32" if cluster.name == "cpu" else low
        self.half = self.dtype != "fp32"
        self.moment_bytes = 4 if config.optimizer.moments == "bf16" else 8
        self._traces: dict[tuple[str, bool, int], Trace] = {}
        self._groups: dict[int, list[ParameterGroup]] = {}

    # ----------------------------------------------------------------------------------------

    def configured(self) -> Choice:
        """Return the layout of the config, with ``auto`` resolved as a start does."""
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
        """Yield every layout with the config's global batch."""
        configured = self.configured()
        whole = configured.images * configured.accumulation
        sizes = micro_batch_sizes(self.config, whole)
        for checkpoint in (False, True):
            for group in self._expert_groups(configured):
                for stage in (1, 2, 3) if self.cluster.size > 1 else (1, 3):
                    if stage == 3 and group > 1:
                        continue
                    for images in sizes:
                        for offload in ("none", "cpu"):
                            yield Choice(stage, group, images, whole // images, checkpoint, offload)

    def _expert_groups(self, configured: Choice) -> list[int]:
        if not self.config.moe.enabled:
            return [1]
        experts, cluster = self.config.moe.num_experts, self.cluster
        groups = {1, configured.expert_parallel_size}
        for size in range(2, min(experts, cluster.size) + 1):
            fits = cluster.per_node % size == 0 or size % cluster.per_node == 0
            if fits and experts % size == 0 and cluster.size % size == 0:
                groups.add(size)
        return sorted(groups)

    # ----------------------------------------------------------------------------------------

    def lay_out(self, choice: Choice, cluster: Cluster | None = None) -> ParallelLayout:
        """Return a choice with its memory and times.

        Args:
            cluster: of the same device; default: the planner's.
        """
        cluster = cluster or self.cluster
        groups = spread(
            self.groups(choice.expert_parallel_size), cluster.size, choice.expert_parallel_size
        )
        traced = self.traced(choice)
        accelerator = cluster.name != "cpu"
        held = states(
            groups,
            stage=choice.stage,
            half=self.half,
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
            gradient_width=2 if self.half and choice.stage else 4,
            expert_scale=scale,
            offloaded_per_image=self._block_inputs() if choice.checkpoint == "offload" else 0,
            margin=int(MARGIN * cluster.memory),
        )
        messages = self.messages(choice, cluster)
        forward, backward = self._compute(traced, choice, cluster)
        exposed = self._exposed(messages, choice, cluster, backward, forward)
        part = sum(g.part if choice.stage else g.elements for g in groups)
        rate = HOST_LINK if choice.offload != "none" else OF_MEMORY * cluster.device.hbm
        # Read: masters, moments and gradients. Written: masters, moments and weights.
        update = part * (2 * (4 + self.moment_bytes) + 4 + 2) / rate
        compute = choice.accumulation * (forward + backward)
        return ParallelLayout(choice, taken, messages, compute, exposed, update)

    def messages(self, choice: Choice, cluster: Cluster | None = None) -> list[Message]:
        """Return the messages of a rank in an update."""
        cluster = cluster or self.cluster
        size = choice.expert_parallel_size
        model = self._model(choice)
        of_states = traffic(
            spread(self.groups(size), cluster.size, size),
            stage=choice.stage,
            half=self.half,
            accumulation=choice.accumulation,
        )
        return of_states + exchanged(
            model,
            self.config.moe,
            expert_parallel_size=size,
            images=choice.images,
            half=self.half,
            accumulation=choice.accumulation,
            padded=cluster.name != "cpu",
        )

    def groups(self, expert_parallel_size: int) -> list[ParameterGroup]:
        """Return the optimizer's groups of a rank."""
        if expert_parallel_size not in self._groups:
            optimizer = self.config.optimizer
            model = meta_model(build_task(self.config), expert_parallel_size)
            self._groups[expert_parallel_size] = groups_of(
                model, optimizer.weight_decay, optimizer.layer_decay
            )
        return self._groups[expert_parallel_size]

    def traced(self, choice: Choice) -> Trace:
        """Return the trace of a choice; sizes of expert groups above 1 share one."""
        autocast = self.half and choice.stage == 0
        group, recompute = choice.expert_parallel_size, str(choice.checkpoint)
        if group > 1:
            known = [g for c, a, g in self._traces if (c, a) == (recompute, autocast)]
            group = max([g for g in known if g > 1], default=group)
        key = (recompute, autocast, group)
        if key not in self._traces:
            model = self._model(choice)
            if choice.checkpoint == "offload":  # the device allocates the same
                model = model.model_copy(update={"use_checkpoint": True})
            self._traces[key] = trace(
                build_task(self.config.model_copy(update={"model": model})),
                dtype=DTYPES[self.dtype],
                autocast=autocast,
                expert_parallel_size=group,
                fused=self.fused,
                padded=group > 1 and self.cluster.name != "cpu",
            )
        return self._traces[key]

    def flops(self, choice: Choice) -> Flops:
        """Count the FLOPs of a rank's micro-batch; each rank computes as many expert rows."""
        return flops(self._model(choice), self.config.moe, choice.images)

    def _model(self, choice: Choice) -> ModelConfig:
        return self.config.model.model_copy(update={"use_checkpoint": choice.checkpoint})

    def _block_inputs(self) -> int:
        """Return the bytes of an image's inputs to the blocks, without each stage's first."""
        model, total = self.config.model, 0
        height, width = model.token_grid
        for stage, depth in enumerate(model.depths):
            tokens = -(-height // 2**stage) * -(-width // 2**stage)
            total += (depth - 1) * tokens * (model.embed_dim << stage)
        return total * (2 if self.half else 4)

    def _compute(self, traced: Trace, choice: Choice, cluster: Cluster) -> tuple[float, float]:
        """Return the seconds of a forward and of a backward pass, summed over ops."""
        device = cluster.device
        peak = device.peak(self.half, self.config.precision.tf32)
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
        """Return the seconds of communication that computation does not hide, by content."""
        group, world = choice.expert_parallel_size, cluster.size
        shape = {
            "world": (world, 1),
            "expert": (group, 1),
            "expert_data": (world // group, group),
        }
        exposed: dict[str, float] = {}
        # Gradients travel during the backward pass (ZeRO-1: the last one), ZeRO-3's weights during
        # both passes.
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
    """Return whether the memory of each device suffices."""
    return layout.memory.total <= cluster.memory


def rank_layouts(
    planner: Planner, configured: ParallelLayout, cluster: Cluster
) -> list[ParallelLayout]:
    """Rank the best layouts of each ZeRO stage, expert group, checkpointing and offload.

    The recommended layout comes first (:func:`recommend`), then the fastest. A kind of which none
    fits is represented by its smallest micro-batch, and comes last. The config's own layout is
    added, and one that recomputes only some of the blocks, if that may be the fastest.

    Args:
        planner: of the config.
        configured: layout of the config.
        cluster: of the run.
    """
    best: dict[tuple[object, ...], ParallelLayout] = {}
    for choice in planner.alternatives():
        key = tuple(replace(choice, images=0, accumulation=0).__dict__.values())
        known = best.get(key)
        if known is not None and fits(known, cluster) and known.choice.images > 4 * choice.images:
            continue  # smaller micro-batches are slower
        layout = planner.lay_out(choice)
        order = _order(layout, cluster)
        if known is None or order < _order(known, cluster):
            best[key] = layout
    ranked = sorted(best.values(), key=lambda layout: _order(layout, cluster))
    spared = _recompute_less(planner, ranked, cluster)
    more = [] if spared is None else [spared]
    if fits(configured, cluster) and all(
        configured.choice != layout.choice for layout in ranked + more
    ):
        more.append(configured)
    ranked = sorted(ranked + more, key=lambda layout: _order(layout, cluster))
    first = recommend(ranked, configured.choice, cluster)
    return [first, *(layout for layout in ranked if layout is not first)]


def recommend(ranked: list[ParallelLayout], configured: Choice, cluster: Cluster) -> ParallelLayout:
    """Return the config's layout if none is clearly faster, otherwise the simplest fast one.

    The simplest has the lowest ZeRO stage, then the fewest changes of the config.

    Args:
        ranked: layouts, the fastest that fits first.
        configured: of the config.
        cluster: of the run.
    """
    close = [
        layout
        for layout in ranked
        if fits(layout, cluster) and layout.seconds <= CLOSE * ranked[0].seconds
    ]

    def changes(layout: ParallelLayout) -> tuple[bool, int, int, float]:
        choice = layout.choice
        changed = sum(a != b for a, b in zip(astuple(choice), astuple(configured), strict=True))
        return changed > 0, choice.stage, changed, layout.seconds

    return min(close, key=changes, default=ranked[0])


def _recompute_less(
    planner: Planner, ranked: list[ParallelLayout], cluster: Cluster
) -> ParallelLayout | None:
    """Return the fastest layout that recomputes all blocks, with the fewest that suffice instead.

    Blocks of early stages come first. A block of each stage costs about as much to repeat, and
    keeps half of the memory of one of the stage before.

    Returns:
        None if recomputing nothing would not be the fastest either, or if all blocks are needed.
    """
    whole = next((one for one in ranked if one.choice.checkpoint and fits(one, cluster)), None)
    if whole is None:
        return None
    without = planner.lay_out(replace(whole.choice, checkpoint=False))
    if fits(without, cluster) or without.seconds >= ranked[0].seconds:
        return None
    depths = planner.config.model.depths
    best, low, high = None, 0, sum(depths)  # low blocks are too few, high suffice
    while high - low > 1:
        middle = (low + high) // 2
        layout = planner.lay_out(replace(whole.choice, checkpoint=_first(middle, depths)))
        if fits(layout, cluster):
            best, high = layout, middle
        else:
            low = middle
    return best


def _first(blocks: int, depths: list[int]) -> list[int]:
    """Return the counts per stage of the first ``blocks`` blocks."""
    before = np.cumsum([0, *depths[:-1]])
    return [int(count) for count in np.clip(blocks - before, 0, depths)]


def _order(layout: ParallelLayout, cluster: Cluster) -> tuple[bool, float]:
    fitting = fits(layout, cluster)
    return not fitting, layout.seconds if fitting else float(layout.memory.total)
