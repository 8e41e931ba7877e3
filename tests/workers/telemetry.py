"""A trainer on two processes with random images: counts, the choice bias, and NaN on one rank."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.config import Config, DataConfig, FaultsConfig, OptimizerConfig, ZeroConfig
from swin_moe.data import Batch
from tests.workers.equivalence import MICRO_BATCH, MODEL, MOE, batch

UPDATES, ACCUMULATION = 3, 2
GREY = DataConfig(mean=[0.0], std=[1.0])
NAME = "layers.1.blocks.1"


class Images:
    """A loader of random images; batch ``spoilt`` has NaN pixels."""

    num_samples = UPDATES * ACCUMULATION * MICRO_BATCH
    workers = 0

    def __init__(self, rank: int, spoilt: int = -1) -> None:
        self.rank, self.spoilt = rank, spoilt

    def read(self, epoch: int, start_batch: int):
        for index in range(start_batch, UPDATES * ACCUMULATION):
            images, labels = batch(index, self.rank)
            if index == self.spoilt:
                images[1] = torch.nan
            valid = torch.ones(len(labels), dtype=torch.bool)
            yield Batch({"images": images}, labels, valid, torch.arange(len(labels)), [])

    def mend(self, batch: Batch) -> Batch:
        return batch

    def keys(self, batch: Batch) -> list[str]:
        return [str(index) for index in batch.indices.tolist()]


def plain_task(config):
    """Build a classification task for normalised images."""
    from swin_moe.tasks.classification import Classification

    class Plain(Classification):
        def prepare(self, batch, step, training):
            return batch._replace(targets=torch.eye(5)[batch.targets])

    return Plain(config)


def make_trainer(world, spoilt: int = -1, stage: int = 1, **changes):
    from swin_moe.models import build
    from swin_moe.training.engine import Engine
    from swin_moe.training.progress import TrainingPlan
    from swin_moe.training.trainer import Trainer

    distributed.seed_everything(0)
    moe = MOE.model_copy(update={"expert_bias_update_rate": 0.01, **changes})
    model = build(MODEL.model_copy(update={"use_checkpoint": True}), moe, world.expert)
    engine = Engine(
        model, world, optimizer=OptimizerConfig(), zero=ZeroConfig(stage=stage),
        dtype=torch.float32, micro_batch=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
    )  # fmt: skip
    plan = TrainingPlan(
        epochs=1, updates_per_epoch=UPDATES, gradient_accumulation_steps=ACCUMULATION,
        eval_every_epochs=1, save_every_epochs=1, save_every_steps=0, log_every_steps=1,
        max_steps=0, max_bad_share=0.001,
    )  # fmt: skip
    records: list[dict] = []
    trainer = Trainer(
        plan=plan, engine=engine, schedule=SimpleNamespace(step_update=lambda update: None),
        train_loader=Images(world.rank, spoilt), eval_loader=None,
        task=plain_task(Config(model=MODEL, moe=moe, data=GREY)), world=world,
        log=SimpleNamespace(write=records.append), save=None,
        saver=MagicMock(), faults=FaultsConfig(nonfinite="stop"), watchdog=MagicMock(),
        stop_signal=lambda: False, say=print,
    )  # fmt: skip
    return trainer, records


def check_bias(world) -> None:
    """The bias moves once per update, by the counts of all micro-steps and ranks."""
    trainer, records = make_trainer(world)
    model = trainer.engine.model
    outputs, forward = [], trainer.engine.forward

    def kept(inputs):
        outputs.append(forward(inputs))
        return outputs[-1]

    trainer.engine.forward = kept
    bias = model.layers[1].blocks[1].mlp.choice_bias
    rises = [bias.rises.clone()]
    write = trainer.log.write

    def noted(record):
        rises.append(bias.rises.clone())
        write(record)

    trainer.log.write = noted
    trainer.train_epoch()
    assert len(outputs) == UPDATES * ACCUMULATION
    for update in range(UPDATES):
        part = outputs[update * ACCUMULATION : (update + 1) * ACCUMULATION]
        counts = distributed.all_reduce_(sum(output.routing.counts for output in part))[0]
        assert counts.sum() == world.size * ACCUMULATION * MICRO_BATCH * 4 * 4 * MOE.top_k
        change = rises[update + 1] - rises[update]
        assert torch.equal(change, (counts.double().mean() - counts).sign().long())
        load = records[update][f"moe/{NAME}/load"]
        assert load == [round(n / int(counts.sum()), 5) for n in counts.tolist()]
        assert records[update][f"moe/{NAME}/drop_rate"] > 0
    assert rises[-1].abs().sum() > 0
    trainer.engine.close()


def check_nan(world) -> None:
    """NaN in one image of rank 1: every rank stops with one message, and no other token is hit."""
    from swin_moe.training.trainer import TrainingError

    spoilt = ACCUMULATION + 1  # in the second update's second micro-step
    rank = world.size - 1
    trainer, records = make_trainer(
        world,
        spoilt if world.rank == rank else -1,
        expert_bias_update_rate=0.0,
        capacity_factor=0.0,
    )
    outputs, forward = [], trainer.engine.forward

    def kept(inputs):
        outputs.append(forward(inputs))
        return outputs[-1]

    trainer.engine.forward = kept
    before = {name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()}
    try:
        trainer.train_epoch()
    except TrainingError as error:
        message = str(error)
    expected = f"non-finite tokens at {NAME} on rank {rank} at step 2; the weights were not changed"
    assert message.startswith(expected), message
    assert len(records) == 1
    changed = [not torch.equal(before[n], p) for n, p in trainer.engine.model.named_parameters()]
    assert any(changed)  # by the first update
    finite = outputs[-1].predictions.isfinite().all(1).tolist()
    hit = world.rank == rank
    assert finite == [True, not hit, True, True]
    assert int(outputs[-1].routing.nonfinite) == (4 * 4 if hit else 0)
    trainer.engine.close()


def work(folder: Path) -> None:
    size = ranks.environment_rank()[2]
    world = distributed.init(expert_parallel_size=size)
    check_bias(world)
    check_nan(world)
    if world.is_main:
        (folder / "passed").write_text("2")
