"""A finite loss with a NaN gradient: every stage refuses the step and keeps the weights."""

from pathlib import Path

import torch
import torch.nn.functional as F

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.config import OptimizerConfig, ZeroConfig
from tests.workers.equivalence import MICRO_BATCH, MODEL, MOE, batch


def state_of(engine) -> dict[str, torch.Tensor]:
    return {
        f"{fragment.name} {kind}": values.clone()
        for fragment in engine.fragments()
        for kind, values in fragment.values.items()
    }


def work(folder: Path) -> None:
    size = ranks.environment_rank()[2]
    world = distributed.init(expert_parallel_size=size)
    from swin_moe.models import build
    from swin_moe.training.engine import Engine

    checked = 0
    for stage in (0, 1, 2) if size > 1 else (0, 1, 2, 3):
        for dtype in (torch.float32, torch.bfloat16):
            engine = Engine(
                build(MODEL, MOE, world.expert), world, optimizer=OptimizerConfig(),
                zero=ZeroConfig(stage=stage), dtype=dtype, micro_batch=MICRO_BATCH,
                gradient_accumulation_steps=1,
            )  # fmt: skip
            engine.train()
            before = state_of(engine)
            images, labels = batch(0, world.rank)
            output = engine.forward({"images": images})
            loss = F.cross_entropy(output.predictions, labels)
            if world.rank == 0:  # √0 is 0, and its derivative infinite
                loss = loss + (output.predictions.sum() * 0).sqrt()
            assert loss.isfinite()
            engine.backward(loss)
            try:
                engine.step()
            except FloatingPointError:
                checked += 1
            for name, value in state_of(engine).items():
                assert torch.equal(value, before[name]), f"{stage} {dtype} {name}"
            # The next update equals one without the bad one before it.
            loss = F.cross_entropy(engine.forward({"images": images}).predictions, labels)
            engine.backward(loss)
            engine.step()
            assert 0 < engine.grad_norm() < 1e3
            assert any(not torch.equal(v, before[n]) for n, v in state_of(engine).items())
            engine.close()
    if world.is_main:
        (folder / "passed").write_text(str(checked))
