"""Counts the reductions of gradients in a micro-step that does not update."""

from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe import distributed
from swin_moe.config import OptimizerConfig, ZeroConfig
from tests.workers.equivalence import MICRO_BATCH, MODEL, MOE, batch

# Collectives of gradients; every micro-step also sends rows to the experts by the all-to-all.
REDUCTIONS = ("allreduce_", "allreduce_coalesced_", "reduce_", "reduce_scatter_",
              "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_")  # fmt: skip


class Collectives(TorchDispatchMode):
    """A count of all collectives by name."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def work(folder: Path) -> None:
    world = distributed.init(expert_parallel_size=2)
    from swin_moe.models import build
    from swin_moe.training.engine import Engine

    for stage in (0, 1, 2):
        engine = Engine(
            build(MODEL, MOE, world.expert), world, optimizer=OptimizerConfig(),
            zero=ZeroConfig(stage=stage), dtype=torch.float32, micro_batch=MICRO_BATCH,
            gradient_accumulation_steps=3,
        )  # fmt: skip
        engine.train()
        for micro in range(3):
            images, labels = batch(0, micro)
            output = engine.forward({"images": images})
            with Collectives() as seen:
                engine.backward(F.cross_entropy(output.predictions, labels) + output.aux_loss)
                engine.step()
            reductions = sum(seen.calls[name] for name in REDUCTIONS)
            place = f"stage {stage}, micro-step {micro}: {dict(seen.calls)}"
            # ZeRO-2 keeps only a part of the gradients, so it reduces them in every micro-step.
            assert (reductions > 0) == (micro == 2 or stage == 2), place
            assert seen.calls["alltoall_base_"] > 0, place
        engine.close()
    if world.is_main:
        (folder / "passed").touch()
