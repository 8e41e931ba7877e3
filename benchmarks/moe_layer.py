"""The Mixture-of-Experts layer compared with a dense one of equal activated FLOPs, and with others.

Times forward and backward, with gradients of tokens and weights. ``dense`` is Linear, GELU, Linear,
of width 4·D for top-1 and 8·D for top-2: a limit, not a peer. All peers have the same weights and
capacity factor 1.25 (sort + loop and grouped_mm drop nothing, FairScale has 2). They run on one
process, and on two with half of the tokens and experts each, where a time is the slower rank's. A
peer slower than dense by 1.4x or 3x runs in each second or fourth round; one slower by 10x in its
first call is left out. Without --full, most of the long cells without a bar are left out.

    python -m benchmarks.moe_layer [--json PATH] [--quick] [--full] [--processes 1,2] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import harness, moe_peers
from benchmarks.moe_peers import Result, Spec, Weights
from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.config import MoEConfig
from swin_moe.distributed import World
from swin_moe.moe import MoELayer

LARGE, SMALL = (18432, 512), (6272, 384)  # tokens, width
SHAPES = [LARGE, (18432, 384), (6272, 512), SMALL]
DTYPES = [torch.bfloat16, torch.float32]
# Most that a top-1 layer of LARGE may take over dense, by device, dtype and experts.
BARS = {
    ("cpu", torch.bfloat16, 8): 1.15,
    ("cpu", torch.bfloat16, 32): 1.30,
    ("cpu", torch.float32, 8): 1.08,
    ("cpu", torch.float32, 32): 1.15,
    ("cuda", torch.bfloat16, 8): 1.10,
    ("cuda", torch.bfloat16, 32): 1.25,
}
HOPELESS = 10.0  # over dense


class Ours(nn.Module):
    """Our layer; its gates are normalised for top-2, as those of all peers."""

    def __init__(self, spec: Spec, weights: Weights, world: World) -> None:
        super().__init__()
        moe = MoEConfig(
            num_experts=spec.experts,
            top_k=spec.top_k,
            capacity_factor=spec.capacity_factor,
            gate_noise=0,
            balance="gshard",
            normalize_gate=spec.top_k > 1,
        )
        self.layer = MoELayer(spec.dim, spec.hidden, moe, world.expert).to(weights.router)
        self.layer.schedules.equal_tokens = True  # as in training
        names = ("router", "experts.fc1", "experts.fc1", "experts.fc2", "experts.fc2")
        kinds = ("weight", "weight", "bias", "weight", "bias")
        keys = (f"{name}.{kind}" for name, kind in zip(names, kinds, strict=True))
        self.layer.load_state_dict(dict(zip(keys, weights.local(world), strict=True)))

    def forward(self, x: Tensor) -> Result:
        result = self.layer(x)
        return result.output, result.aux_loss


class Dense(nn.Module):
    """The limit: a layer without routing, with as many FLOPs per token."""

    def __init__(self, spec: Spec, weights: Weights, world: World) -> None:
        super().__init__()
        self.layer = moe_peers.feed_forward(spec.dim, spec.top_k * spec.hidden).to(weights.router)

    def forward(self, x: Tensor) -> Result:
        return self.layer(x), x.new_zeros(())


def name_of(spec: Spec) -> str:
    return f"T={spec.tokens} D={spec.dim} E={spec.experts} k={spec.top_k}"


def in_short(spec: Spec, processes: int) -> bool:
    """Return whether a cell runs without --full: it has a bar, is cheap, or is a sample."""
    shape = (spec.tokens, spec.dim)
    if shape == SMALL or (shape == LARGE and spec.top_k == 1):
        return True
    if processes > 1 or spec.dtype != torch.bfloat16:
        return False
    return shape == LARGE or spec.top_k == 1


def grid(options: argparse.Namespace, processes: int) -> list[Spec]:
    """Return the cells to measure."""
    if options.quick:
        return [Spec(*SMALL, 8, 1, torch.bfloat16), Spec(*SMALL, 8, 2, torch.float32)]
    cells = product(SHAPES, (1, 2), (8, 32), DTYPES)
    specs = [Spec(*shape, experts, top_k, dtype) for shape, top_k, experts, dtype in cells]
    return [spec for spec in specs if options.full or in_short(spec, processes)]


def bar_of(spec: Spec, world: World) -> float | None:
    if (spec.tokens, spec.dim) != LARGE or spec.top_k != 1:
        return None
    return BARS.get((world.device.type, spec.dtype, spec.experts))


def forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    output, loss = layer(x)
    outputs, grads = [output], [grad]
    if loss.requires_grad:
        outputs, grads = [output, loss], [grad, torch.ones_like(loss)]
    return torch.autograd.grad(outputs, (x, *layer.parameters()), grads)


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of the slowest rank, from a common start."""
    distributed.barrier()
    taken = torch.tensor(harness.seconds(run), dtype=torch.float64)
    return distributed.all_reduce_(taken, "max").item()


def agreed(problem: str, world: World) -> str:
    """Return the first problem of any rank, so that all ranks leave out the same contenders."""
    if world.size == 1:
        return problem
    problems: list[str] = [""] * world.size
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def wrong(name: str, build: moe_peers.Builder, spec: Spec, world: World) -> str:
    """Return why a contender's output or token gradient is wrong on a small layer; or nothing."""
    # FairScale draws the second expert at random: of two experts it is always the other.
    experts = 2 if name == "fairscale" else 4
    small = Spec(128 * world.size, 64, experts, spec.top_k, spec.dtype, experts)
    weights = moe_peers.random_weights(small, world.device, std=0.2)
    torch.manual_seed(1 + world.rank)
    x = torch.randn(128, 64, device=world.device).to(spec.dtype).requires_grad_()
    grad = torch.randn_like(x)
    problem = ""
    try:
        expected = moe_peers.reference(x, weights, spec.top_k)
        actual, _ = build(small, weights, world)(x)
        pairs = [(actual, expected)]
        pairs += zip(
            torch.autograd.grad(actual, x, grad),
            torch.autograd.grad(expected, x, grad.float()),
            strict=True,
        )
        errors = [((a.float() - e.float()).norm() / e.float().norm()).item() for a, e in pairs]
        if max(errors) > (1e-4 if spec.dtype == torch.float32 else 0.03):
            problem = f"wrong by {max(errors):.2g} of the output or gradient"
    except Exception as error:
        problem = f"does not run here: {(str(error).strip() or repr(error)).splitlines()[0][:100]}"
    return agreed(problem, world)


class Cell:
    """The contenders of a cell, built, checked and called once."""

    def __init__(self, spec: Spec, world: World) -> None:
        self.spec, self.world = spec, world
        self.left_out: dict[str, str] = {}
        self.runs: dict[str, Callable[[], object]] = {}
        self.ratios: dict[str, float] = {}  # of the first call, over dense
        device = world.device
        self.weights = moe_peers.random_weights(spec, device)
        torch.manual_seed(1 + world.rank)
        shape = (spec.tokens // world.size, spec.dim)
        self.x = torch.randn(shape, device=device).to(spec.dtype).requires_grad_()
        self.grad = torch.randn(shape, device=device).to(spec.dtype)
        self.add("dense", Dense)
        for name, build in moe_peers.peers(spec, world.size).items():
            reason = self.reason(name, build)
            if reason:
                self.left_out[name] = reason
            else:
                self.add(name, build)
        problem = wrong("ours", Ours, spec, world)
        if problem:
            raise RuntimeError(f"our layer: {problem}")
        self.add("ours", Ours)

    def reason(self, name: str, build: moe_peers.Builder) -> str:
        """Return why a peer is left out before its first call; or nothing."""
        if name == "fairscale":
            need = moe_peers.FairScale.memory(self.spec, self.world.size)
            if need > memory() / 2:
                return f"its one-hot tensors need {need / 2**30:.0f} GiB"
        return wrong(name, build, self.spec, self.world)

    def add(self, name: str, build: moe_peers.Builder) -> None:
        """Build a contender and call it once; leave it out if that takes too long."""
        layer = build(self.spec, self.weights, self.world)
        run = partial(forward_backward, layer, self.x, self.grad)
        taken = min(timed(run) for _ in range(3 if torch.cuda.is_available() else 1))
        if name == "dense":
            taken = min(taken, timed(run))
            self.dense = taken
        self.ratios[name] = taken / self.dense
        if self.ratios[name] > HOPELESS and name != "ours":
            self.left_out[name] = f"{self.ratios[name]:.0f}x dense in its first call"
        else:
            self.runs[name] = run

    def measure(self, rounds: int) -> dict[str, object]:
        slow = {
            name: 4 if ratio > 3 else 2
            for name, ratio in self.ratios.items()
            if ratio > 1.4 and name != "ours"
        }
        times = harness.interleaved(self.runs, rounds, 0, timer=timed, every=slow)
        spec, dense = self.spec, times.pop("dense")
        ratios = {name: round(taken / dense, 3) for name, taken in times.items()}
        mode = f"{self.world.size} process{'es' if self.world.size > 1 else ''}"
        cell = harness.cell(
            name_of(spec),
            spec.dtype,
            mode,
            times,
            dense=round(dense, 3),
            ratio_to_dense=ratios.pop("ours"),
            peers_to_dense=ratios,
            bar=bar_of(spec, self.world),
            left_out=self.left_out,
        )
        cell["verdict"] = verdict(cell)
        return cell


def memory() -> int:
    """Return the bytes of memory of this machine or GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def verdict(cell: dict[str, object]) -> str:
    """Return whether the bar is met and every peer is slower, with shortfalls in capitals."""
    peers, bar, ratio = cell["peers"], cell["bar"], cell["ratio_to_dense"]
    assert isinstance(peers, dict)
    assert isinstance(ratio, float)
    words = []
    if isinstance(bar, float):
        words.append(f"bar {bar:.2f} {'met' if ratio <= bar else 'MISSED'}")
    ahead = [name for name, taken in peers.items() if taken < float(str(cell["ours"]))]
    if ahead:
        words.append(f"BEHIND {', '.join(ahead)}")
    return "; ".join(words)


def traffic(processes: int) -> list[dict[str, object]]:
    """Count the bytes a token that dispatch and combine move in bf16, from the shapes.

    At least: encode reads a row and writes k, decode reads k and writes one, 8·D bytes for top-1,
    forward and backward alike. Ours has k rows a token for any capacity, reads a token once
    per choice; backward also reads the k expert outputs, for the gate's gradient. The all-to-all
    carries the kept rows four times (8·D·k·(W-1)/W), on a CPU no others.
    """
    cells: list[dict[str, object]] = []
    for width, top_k in product((384, 512), (1, 2)):
        row = 2 * width
        least = (2 + 2 * top_k) * row
        forward = (3 * top_k + 1) * row + 8 * top_k  # an index of 4 bytes for each row, both ways
        backward = forward + top_k * row
        share = 4 * (processes - 1) / processes
        cells.append(
            {
                "name": f"D={width} k={top_k}",
                "unit": "bytes/token, bf16",
                "forward": round(forward),
                "backward": round(backward),
                "least, each": least,
                "over least": round((forward + backward) / (2 * least), 2),
                f"all-to-all, W={processes}": round(share * top_k * row),
            }
        )
    return cells


def measure_all(options: argparse.Namespace, world: World) -> list[dict[str, object]]:
    """Measure every cell of this number of processes; rank 0 prints each."""
    cells = []
    for spec in grid(options, world.size):
        # Two rounds fewer without a bar.
        rounds = options.rounds if bar_of(spec, world) else max(2, options.rounds - 2)
        harness.release_memory()
        cell = Cell(spec, world).measure(rounds)
        cells.append(cell)
        if world.is_main:
            print("  ".join(columns(cell)), flush=True)
    return cells


def columns(cell: dict[str, object]) -> list[str]:
    return harness.row(cell, "dense", "ratio_to_dense", "verdict")


def work(options: argparse.Namespace) -> NoReturn:
    """Measure as one of several processes."""
    world = distributed.init(expert_parallel_size=ranks.environment_rank()[2])
    harness.hand_over(options.worker, measure_all(options, world), world)


def show(cells: list[dict[str, object]], moved: list[dict[str, object]]) -> None:
    names = list(dict.fromkeys(name for c in cells for name in dict(c["peers_to_dense"])))  # type: ignore[call-overload]
    headings = harness.columns("dense", "to dense", "verdict")
    harness.report("MoE layer, forward + backward, ms", headings, [columns(c) for c in cells])
    ratios = []
    for c in cells:
        over = {**dict(c["peers_to_dense"]), "ours": c["ratio_to_dense"]}  # type: ignore[call-overload]
        figures = [f"{over[name]:.2f}" if name in over else "" for name in ["ours", *names]]
        ratios.append([str(c["name"]), str(c["dtype"]), str(c["mode"]), *figures])
    harness.report("time over dense", ["cell", "dtype", "mode", "ours", *names], ratios)
    harness.report(
        "dispatch and combine, bytes moved against the least",
        list(moved[0]),
        [[str(value) for value in entry.values()] for entry in moved],
    )
    for c in cells:
        for name, reason in dict(c["left_out"]).items():  # type: ignore[call-overload]
            print(f"{c['name']} {c['dtype']} {c['mode']}: {name} left out: {reason}")
    harness.summary(cells)


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="every cell")
    parser.add_argument("--processes", type=partial(str.split, sep=","), default=["1", "2"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    harness.tuned_process()
    if options.worker:
        work(options)
    cells = []
    # First the others, while this process holds no memory.
    if "2" in options.processes and torch.cuda.device_count() != 1:
        cells += harness.on_processes("benchmarks.moe_layer", 2)
    if "1" in options.processes:
        cells = measure_all(options, distributed.init()) + cells
    moved = traffic(processes=2)
    show(cells, moved)
    harness.write_json(options.json, cells, full=options.full, bytes_moved=moved)
    distributed.shutdown()


if __name__ == "__main__":
    main()
