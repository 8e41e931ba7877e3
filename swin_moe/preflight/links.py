"""Measures clocks, speeds and links of the processes, with messages of the run's sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..config import Config
from ..distributed import World, all_reduce_, barrier, gather_objects
from ..distributed.expert_placement import BUCKET
from ..models.cost import Cost
from .agreement import named
from .facts import Facts

FIRST = 2**20  # elements of the first try, whose time gives the number for BUDGET
BUDGET = 1.0  # seconds of one try
REPEATS = 5
RING = 2**20  # elements that each rank sends to the next
MATRIX = 512  # sides of the matrices whose product measures the computing speed
PINGS = 5
SLOW = 3.0  # a warning is due from this many times the usual time on
SKEW = 1.0  # seconds between clocks above which a warning is due


@dataclass(frozen=True)
class Timing:
    """The time of a collective.

    Attributes:
        name: of the collective.
        bytes: of a rank's tensor.
        seconds: of the slowest rank.
        bandwidth: bytes/s through a rank's link, as nccl-tests count them.
    """

    name: str
    bytes: int
    seconds: float
    bandwidth: float


@dataclass(frozen=True)
class Links:
    """The measurements; the same on every rank.

    Attributes:
        timings: of the collectives.
        skew: seconds by which the clock of each rank's host is ahead of rank 0's.
        ring: seconds of a message to each rank from the one before it.
        compute: FLOP/s of each rank.
    """

    timings: list[Timing]
    skew: list[float]
    ring: list[float]
    compute: list[float]


def measure(
    config: Config, cost: Cost, dtype: torch.dtype, world: World, facts: list[Facts]
) -> Links:
    """Measure clocks, collectives, links and speeds, in a second or two each; all ranks call it.

    Args:
        cost: of the model.
        dtype: of the messages and the product.
        facts: by rank.

    Raises:
        RuntimeError: a collective failed or timed out.
    """
    skew = _skew(world, [rank for rank, fact in enumerate(facts) if rank and not fact.local_rank])
    leader = {fact.host: rank for rank, fact in enumerate(facts) if not fact.local_rank}
    dense = cost.parameters - (cost.experts if world.expert.size > 1 else 0)
    timings = [_all_reduce(min(dense, BUCKET), dtype, world)]
    if world.expert.size > 1:
        timings.append(_all_to_all(dispatched_elements(config), dtype, world))
    mine = _ring(dtype, world), _compute(dtype, world)
    ring, compute = zip(*gather_objects(mine), strict=True)
    return Links(
        timings, [skew.get(leader.get(f.host, 0), 0.0) for f in facts], list(ring), list(compute)
    )


def judge(links: Links, facts: list[Facts]) -> list[str]:
    """Return warnings about clocks that differ, and processes and links that are slow."""
    lines = []
    for host, skew in {f.host: s for f, s in zip(facts, links.skew, strict=True)}.items():
        if abs(skew) > SKEW:
            way = "ahead of" if skew > 0 else "behind"
            lines.append(f"{host}: its clock is {abs(skew):.1f} s {way} {facts[0].host}'s")
    usual = statistics.median_high(links.compute)
    for rank, speed in enumerate(links.compute):
        if speed * SLOW < usual:
            lines.append(
                f"{named(facts, [rank])} computes {usual / speed:.1f} times slower than is usual "
                "here: something else runs there, or it is throttled"
            )
    within = [facts[rank - 1].host == fact.host for rank, fact in enumerate(facts)]
    for kind in (True, False):  # links within hosts, and between them
        ranks = [rank for rank, inside in enumerate(within) if inside == kind]
        usual = statistics.median_low([links.ring[rank] for rank in ranks]) if ranks else 0.0
        for rank in ranks:
            if links.ring[rank] > SLOW * usual:
                before = (rank - 1) % len(facts)
                lines.append(
                    f"the link from {named(facts, [before])} to {named(facts, [rank])} is "
                    f"{links.ring[rank] / usual:.1f} times slower than is usual here"
                )
    return lines


def dispatched_elements(config: Config) -> int:
    """Return the elements that a rank sends in the dispatch of the first, largest MoE layer."""
    height, width = config.model.token_grid
    stage = next(index for index, blocks in enumerate(config.moe.blocks) if blocks)
    tokens = -(-height // 2**stage) * -(-width // 2**stage) * config.data.batch_size
    rows = tokens * config.moe.top_k * (config.moe.capacity_factor or 1.0)
    return int(rows) * (config.model.embed_dim << stage)


def _all_reduce(elements: int, dtype: torch.dtype, world: World) -> Timing:
    def run(x: torch.Tensor) -> None:
        dist.all_reduce(x)

    passed = 2 * (world.size - 1) / world.size
    return _time("all-reduce", run, elements, passed, dtype, world)


def _all_to_all(elements: int, dtype: torch.dtype, world: World) -> Timing:
    group = world.expert

    def run(x: torch.Tensor) -> None:
        x = x[: x.numel() // group.size * group.size]
        dist.all_to_all_single(torch.empty_like(x), x, group=group.handle)

    return _time("all-to-all", run, elements, (group.size - 1) / group.size, dtype, world)


def _time(
    name: str,
    run: Callable[[torch.Tensor], None],
    elements: int,
    passed: float,
    dtype: torch.dtype,
    world: World,
) -> Timing:
    """Time a collective of ``elements``, or of as many as it carries in BUDGET if that is less.

    Args:
        run: makes the collective with the tensor.
        passed: bytes through each rank's link, over those of its tensor.
    """
    x = torch.zeros(min(elements, FIRST), dtype=dtype, device=world.device)
    run(x)  # connects
    first = _slowest(lambda: run(x), world)
    elements = min(elements, max(int(x.numel() * BUDGET / first), FIRST))
    x = torch.zeros(elements, dtype=dtype, device=world.device)
    first = _slowest(lambda: run(x), world)
    repeats = max(min(REPEATS, int(BUDGET / first)), 1)
    seconds = statistics.median(_slowest(lambda: run(x), world) for _ in range(repeats))
    size = elements * dtype.itemsize
    return Timing(name, size, seconds, passed * size / seconds)


def _slowest(run: Callable[[], object], world: World) -> float:
    """Return the seconds of the slowest rank."""
    barrier()
    taken = torch.tensor(_seconds(run, world), dtype=torch.float64)
    return max(float(all_reduce_(taken, "max")), 1e-9)


def _seconds(run: Callable[[], object], world: World) -> float:
    _synchronise(world)
    began = time.perf_counter()
    run()
    _synchronise(world)
    return time.perf_counter() - began


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _ring(dtype: torch.dtype, world: World) -> float:
    """Return the seconds of a message from the rank before, while all ranks send to the next."""
    out = torch.zeros(RING, dtype=dtype, device=world.device)
    into = torch.empty_like(out)
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def run() -> None:
        ends = [dist.P2POp(dist.isend, out, after), dist.P2POp(dist.irecv, into, before)]
        for work in dist.batch_isend_irecv(ends):
            work.wait()

    run()
    times = []
    for _ in range(REPEATS):
        barrier()
        times.append(_seconds(run, world))
    return statistics.median(times)


def _compute(dtype: torch.dtype, world: World) -> float:
    """Return the FLOP/s of a matrix product while all ranks compute."""
    x = torch.randn(MATRIX, MATRIX, device=world.device).to(dtype)
    barrier()
    times = [_seconds(lambda: x @ x, world) for _ in range(REPEATS)]
    return 2 * MATRIX**3 / min(times)


def _skew(world: World, leaders: list[int]) -> dict[int, float]:
    """Return the seconds by which the clock of each leader is ahead of rank 0's.

    Rank 0 asks for the time. It takes the answer as the time in the middle of the round trip, and
    uses the shortest of a few trips, as NTP does.

    Args:
        leaders: one rank of each host.
    """
    skew = {}
    for leader in leaders:
        if world.rank == 0:
            skew[leader] = _ask(leader)
        elif world.rank == leader:
            for _ in range(PINGS):
                dist.recv(torch.empty(1, dtype=torch.float64), 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
    return dict(gather_objects(skew)[0])


def _ask(leader: int) -> float:
    trips = []
    for _ in range(PINGS):
        answer = torch.zeros(1, dtype=torch.float64)
        asked = time.time()
        dist.send(answer, leader)
        dist.recv(answer, leader)
        trips.append((time.time() - asked, float(answer) - (asked + time.time()) / 2))
    return min(trips)[1]
