"""Count the gradient collectives of a micro-step that does not update."""

import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from swin_moe import distributed
from swin_moe.config import OptimizerConfig, ZeroConfig
from tests.workers.equivalence import MICRO_BATCH, MODEL, MOE, batch

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor", "_reduce_scatter_base", "all_gather")


def count_calls(counter: Counter) -> None:
    for name in REDUCTIONS:
        original = getattr(dist, name)

        def counted(*args, original=original, name=name, **kwargs):
            counter[name] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)


def main() -> None:
    world = distributed.init(expert_parallel_size=2)
    from swin_moe.engine import Engine
    from swin_moe.models import build

    calls: Counter = Counter()
    count_calls(calls)
    for stage in (0, 1):
        engine = Engine(
            build(MODEL, MOE, world.expert), world, optimizer=OptimizerConfig(),
            zero=ZeroConfig(stage=stage), dtype=torch.float32, micro_batch=MICRO_BATCH,
            accumulation_steps=2,
        )  # fmt: skip
        engine.train()
        for micro in range(2):
            images, labels = batch(0, micro)
            output = engine.forward(images)
            calls.clear()
            engine.backward(F.cross_entropy(output.logits, labels) + output.aux_loss)
            engine.step()
            found = sum(calls.values())
            assert (found > 0) == (micro == 1), f"stage {stage}, micro-step {micro}: {calls}"
        engine.close()
    if world.is_main:
        (Path(sys.argv[1]) / "passed").touch()
    distributed.shutdown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
