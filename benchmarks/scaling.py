"""Weak scaling from one process to two: the same work for each, and the parts of an update's time.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json

Efficiency is the throughput of two processes over twice that of one, which is the ratio of their
times. Two independent processes also slow one another down, by the machine (caches, memory,
clocks): "apart" measures that, and efficiency over apart is the cost of communication. Processes
start once and take turns; the others sleep meanwhile. Batches are random numbers, made
beforehand: benchmarks.loader measures loading.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import harness
from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.common.host import silenced
from swin_moe.config import load_config
from swin_moe.reporting.profiler import KINDS, read, split

RECIPE = Path(__file__).parent.parent / "configs/fashion_mnist/swin_moe_micro.yaml"
KINDS_OF_MODEL = ("dense", "MoE, experts on each", "MoE, experts shared out")
WORKERS = {"one": 1, "other": 1, "two": 2}  # processes of each
TURNS = {"one": ["one"], "apart": ["one", "other"], "two": ["two"]}
PATIENCE = timedelta(minutes=10)
WARM_UP = 3


def cells(quick: bool) -> list[tuple[str, int]]:
    return [(kind, stage) for stage in ((1,) if quick else (1, 2)) for kind in KINDS_OF_MODEL]


# ------------------------------------------------------------------------------------------------
# The measured processes


def work(name: str, port: int, quick: bool) -> None:
    """Build each cell, and run it when the measuring process asks."""
    torch.set_flush_denormal(True)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    distributed.init()
    from swin_moe.models import build
    from swin_moe.training.engine import (
        Engine,  # imports DeepSpeed, which looks at what init has set
    )

    turn = 0
    for kind, stage in cells(quick):
        config = load_config(RECIPE, [f"zero.stage={stage}", "precision.dtype=fp32"])
        if kind == "dense":
            config.moe.blocks = []
        shared = kind == KINDS_OF_MODEL[2]
        world = distributed.init(ranks.environment_rank()[2] if shared else 1)
        distributed.seed_everything(0)
        batch = 16 if quick else 32
        engine = Engine(
            build(config.model, config.moe, world.expert), world, optimizer=config.optimizer,
            zero=config.zero, dtype=torch.float32, micro_batch=batch, gradient_accumulation_steps=1,
        )  # fmt: skip
        engine.train()
        images = torch.randn(batch, config.model.in_chans, *config.model.image_sides)
        labels = torch.randint(config.model.num_classes, (batch,))

        def update(engine: Any = engine, images: Any = images, labels: Any = labels) -> None:
            with record_function("update"):
                logits, aux_loss, _ = engine.forward({"images": images})
                loss = F.cross_entropy(logits, labels)
                engine.backward(loss if aux_loss is None else loss + aux_loss)
                engine.step()

        for _ in range(WARM_UP):
            update()
        store.set(f"ready/{name}/{kind}/{stage}/{world.rank}", "")
        while True:
            order = store.get(f"go/{name}/{turn}").decode()
            if order == "next":
                turn += 1
                break
            answer = traced(update) if order == "trace" else timed(update, int(order))
            store.set(f"done/{name}/{turn}/{world.rank}", json.dumps(answer))
            turn += 1
        engine.close()
    distributed.shutdown()
    ranks.leave(0)


def timed(update: Any, count: int) -> float:
    """Return the milliseconds of an update."""
    began = time.perf_counter()
    for _ in range(count):
        update()
    return 1e3 * (time.perf_counter() - began) / count


def traced(update: Any) -> dict[str, float]:
    """Return the parts of an update's time, from five updates under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        with silenced(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(5):
                update()
        profiler.export_chrome_trace(str(path))
        return split(read(path))


# ------------------------------------------------------------------------------------------------
# The measuring process


class Crew:
    """The workers, and the store by which they receive orders."""

    def __init__(self, quick: bool) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE,
                                   wait_for_workers=False)  # fmt: skip
        self.turns = dict.fromkeys(WORKERS, 0)
        self.processes = [self._start(name, quick) for name in WORKERS]

    def _start(self, name: str, quick: bool) -> subprocess.Popen[bytes]:
        words = ["--worker", name, "--port", str(self.store.port), *["--quick"] * quick]
        command = harness.torchrun(WORKERS[name], "benchmarks.scaling", *words)
        env = {**os.environ, **harness.ALLOCATOR, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=env)

    def await_cell(self, kind: str, stage: int) -> None:
        keys = [
            f"ready/{name}/{kind}/{stage}/{rank}"
            for name, size in WORKERS.items()
            for rank in range(size)
        ]
        for key in keys:
            while not self.store.check([key]):
                if any(process.poll() for process in self.processes):
                    raise SystemExit("a worker failed; its error is above")
                time.sleep(0.1)

    def order(self, names: list[str], order: str) -> list[Any]:
        """Let some workers run at the same time, and return the answers of their processes."""
        for name in names:
            self.store.set(f"go/{name}/{self.turns[name]}", order)
        answers = []
        for name in names:
            for rank in range(WORKERS[name] if order != "next" else 0):
                answers.append(json.loads(self.store.get(f"done/{name}/{self.turns[name]}/{rank}")))
            self.turns[name] += 1
        return answers


def measure(crew: Crew, kind: str, stage: int, rounds: int, updates: int) -> dict[str, object]:
    crew.await_cell(kind, stage)
    times: dict[str, list[float]] = {turn: [] for turn in TURNS}
    for _ in range(rounds):
        for turn, names in TURNS.items():
            times[turn].append(statistics.fmean(crew.order(names, str(updates))))
    splits = {}
    for name in ("one", "two"):
        answers = crew.order([name], "trace")
        splits[name] = {k: round(statistics.fmean(one[k] for one in answers), 2) for k in KINDS}
    crew.order(list(WORKERS), "next")
    one, apart, two = (statistics.median(times[turn]) for turn in TURNS)
    return harness.cell(
        f"{kind}, ZeRO {stage}", torch.float32, "update",
        {"ours": two, "one process": one, "two apart": apart},
        efficiency=round(one / two, 3), machine=round(one / apart, 3), split=splits,
    )  # fmt: skip


def report(results: list[dict[str, Any]]) -> None:
    rows = []
    for cell in results:
        efficiency, apart = (f"{100 * cell[key]:.0f} %" for key in ("efficiency", "machine"))
        times = [f"{cell['peers']['one process']:.0f}", f"{cell['ours']:.0f}"]
        for name in ("one", "two"):
            head = [cell["name"], *times, efficiency, apart] if name == "one" else [""] * 5
            rows.append([*head, name, *(f"{cell['split'][name][kind]:.1f}" for kind in KINDS)])
    heads = ["cell", "one ms", "two ms", "efficiency", "apart", "split of", *KINDS]
    title = "weak scaling, one process to two (splits in ms, under the profiler)"
    harness.report(title, heads, rows)


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--worker", choices=list(WORKERS))
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.port, options.quick)
    crew = Crew(options.quick)
    rounds, updates = (3, 2) if options.quick else (9, 4)
    results = [measure(crew, kind, stage, rounds, updates) for kind, stage in cells(options.quick)]
    for process in crew.processes:
        process.wait()
    report(results)
    harness.write_json(options.json, results, rounds=rounds, updates=updates)


if __name__ == "__main__":
    main()
