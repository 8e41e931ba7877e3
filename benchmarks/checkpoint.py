"""The cost of a checkpoint to a training, compared with DeepSpeed's and PyTorch's; resharding.

Two processes train a mixture of experts; contenders take turns at saving what the optimizer holds.
The stall is how long the call keeps the training waiting; the delay is what a save costs in all:
the time of the call and of the steps after it, until it is on disk, over that of as many steps.

    python -m benchmarks.checkpoint [--json PATH] [--quick] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

from benchmarks import harness
from swin_moe import checkpoint, distributed
from swin_moe.checkpoint import Saved, Writer
from swin_moe.config import ModelConfig, MoEConfig, OptimizerConfig, ZeroConfig
from swin_moe.distributed import World
from swin_moe.distributed.expert_placement import ExpertLayout, expert_share

PROCESSES, BATCH = 2, 16
MODEL = ModelConfig(
    img_size=64, embed_dim=48, depths=[1, 1, 2, 2], num_heads=[2, 4, 8, 16], window_size=8,
    num_classes=100,
)  # fmt: skip
MOE = MoEConfig(blocks=[[], [], [1], [1]], num_experts=8)


class Bench:
    """A training on this rank, and the contenders that save it."""

    def __init__(self, world: World, folder: Path) -> None:
        from swin_moe.models import build, expert_parameter_names
        from swin_moe.training.engine import Engine

        distributed.seed_everything(0)
        model = build(MODEL, MOE, world.expert)
        share = expert_share(MOE.num_experts, world.expert.rank, world.expert.size)
        self.layout = ExpertLayout(expert_parameter_names(model), MOE.num_experts, share)
        self.world, self.folder, self.step = world, folder, 0
        self.engine = Engine(
            model, world, optimizer=OptimizerConfig(), zero=ZeroConfig(stage=1),
            dtype=torch.float32, micro_batch=BATCH, gradient_accumulation_steps=1,
        )  # fmt: skip
        self.engine.train()
        self.saved: list[Saved] = []
        self.writer = Writer(folder / "ours", world, self.saved.append)
        self.pending: object = None
        self.group = dist.new_group()  # its thread must not meet the training's collectives
        self.images = torch.randn(BATCH, 3, 64, 64)
        self.labels = torch.randint(0, 100, (BATCH,))

    def train_step(self) -> None:
        output = self.engine.forward({"images": self.images})
        self.engine.backward(F.cross_entropy(output.predictions, self.labels) + output.aux_loss)
        self.engine.step()
        float(self.engine.grad_norm())

    def state(self) -> dict[str, torch.Tensor]:
        """Return this rank's tensors, under names that no other rank uses."""
        return {
            f"{self.world.rank}/{part.name}/{kind}": tensor
            for part in self.engine.fragments()
            for kind, tensor in part.values.items()
        }

    def ours(self) -> None:
        fragments = self.engine.fragments()
        self.writer.save(self.step, fragments, self.layout, state={}, config_text="", keep_last=1)

    def ours_waiting(self) -> None:
        self.ours()
        self.writer.wait()

    def torch_dcp(self) -> None:
        dcp.save(self.state(), checkpoint_id=self.folder / f"dcp-{self.step}")

    def torch_dcp_async(self) -> None:
        where = self.folder / f"dcp-async-{self.step}"
        self.pending = dcp.async_save(self.state(), checkpoint_id=where, process_group=self.group)

    def deepspeed(self) -> None:
        self.engine.deepspeed.save_checkpoint(str(self.folder / f"deepspeed-{self.step}"))

    def settle(self) -> None:
        """Wait until everything is on disk."""
        self.writer.wait()
        if self.pending is not None:
            self.pending.result()  # type: ignore[attr-defined]
            self.pending = None
        distributed.barrier()
        if self.world.is_main:
            os.sync()
        distributed.barrier()

    def make_room(self) -> None:
        if self.world.is_main:
            for path in self.folder.glob("*-*"):
                shutil.rmtree(path)
            os.sync()
        distributed.barrier()

    def timed(self, run: Callable[[], object]) -> float:
        distributed.barrier()
        return harness.seconds(run)

    def measure(self, rounds: int, steps: int) -> dict[str, object]:
        contenders = {
            "ours": self.ours,
            "ours, waiting": self.ours_waiting,
            "deepspeed": self.deepspeed,
            "torch dcp": self.torch_dcp,
            "torch dcp, async": self.torch_dcp_async,
        }
        if self.world.expert.size > 1:
            del contenders["deepspeed"]  # it does not support stacked experts
        stalls: dict[str, list[float]] = {name: [] for name in contenders}
        delays: dict[str, list[float]] = {name: [] for name in contenders}
        alone: list[float] = []
        for turn in range(-1, rounds):
            for name, save in contenders.items():
                self.step += 1
                without = [self.timed(self.train_step) for _ in range(steps)]
                stall = self.timed(save)
                begun = time.perf_counter()
                for _ in range(steps):
                    self.timed(self.train_step)
                self.settle()
                after = time.perf_counter() - begun
                self.make_room()
                if turn >= 0:
                    alone += without
                    stalls[name].append(stall)
                    delays[name].append(stall + after - sum(without))
        step = 1e3 * statistics.median(alone)
        times = {name: 1e3 * statistics.median(taken) for name, taken in stalls.items()}
        waited = {n: round(1e3 * statistics.median(taken), 1) for n, taken in delays.items()}
        group = self.world.expert.size
        return harness.cell(
            f"{PROCESSES} processes, EP {group}", torch.float32, "ZeRO-1", times,
            step=round(step, 1), stall_of_step=round(times["ours"] / step, 3), delay=waited,
        )  # fmt: skip


def work(options: argparse.Namespace) -> NoReturn:
    """Measure on this rank, as one of the processes."""
    cells = []
    rounds, steps = (1, 3) if options.quick else (7, 6)
    for group in (1, PROCESSES):
        world = distributed.init(expert_parallel_size=group)
        bench = Bench(world, options.folder / f"ep{group}")
        cells.append(bench.measure(rounds, steps))
        bench.engine.close()
    harness.hand_over(options.worker, cells, world)


def measure_reshard(source: Path, rounds: int) -> list[dict[str, object]]:
    """Return seconds and bytes of resharding a checkpoint into one, two and four files."""
    size = sum(file.stat().st_size for file in source.iterdir())
    cells: list[dict[str, object]] = []
    for files in (1, 2, 4):
        taken = []
        target = source.with_name(f"in-{files}")
        for _ in range(rounds):
            taken.append(harness.seconds(lambda: checkpoint.reshard(source, target, files)))  # noqa: B023
            written = sum(file.stat().st_size for file in target.iterdir())
            shutil.rmtree(target)
        seconds = statistics.median(taken)
        cells.append(
            {
                "files": files,
                "MB read": round(size / 1e6, 1),
                "MB written": round(written / 1e6, 1),
                "s": round(seconds, 2),
                "MB/s": round((size + written) / 1e6 / seconds),
            }
        )
    return cells


def main() -> None:
    harness.tuned_process()
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        cells = harness.on_processes("benchmarks.checkpoint", PROCESSES, "--folder", str(folder))
        saved = checkpoint.latest(folder / f"ep{PROCESSES}/ours")
        assert saved is not None
        resharded = measure_reshard(saved, 1 if options.quick else 3)
    more = ["step", "stall_of_step"]
    harness.report(
        "Stall of a save, ms", harness.columns(*more), [harness.row(c, *more) for c in cells]
    )
    for cell in cells:
        print(f"{cell['name']}: stalls {cell['peers']}, whole delays {cell['delay']} ms")
    columns = list(resharded[0])
    harness.report("Reshard", columns, [[str(cell[c]) for c in columns] for cell in resharded])
    harness.write_json(options.json, cells, reshard=resharded)


if __name__ == "__main__":
    main()
