"""Counts the bytes that a rank passes to collectives in an update, in torch's dispatcher."""

import gc
import json
from pathlib import Path

import torch
from timm.loss import SoftTargetCrossEntropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.config import Config, validate
from swin_moe.models import build
from swin_moe.training import engine as engine_module
from swin_moe.training.engine import Engine

# The argument whose bytes count: the gathered whole, or the sent whole.
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
}


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sent = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in KINDS:
            kind, place = KINDS[name]
            tensors = [t for t in tree_leaves(args[place]) if isinstance(t, torch.Tensor)]
            # Flags, norms and lengths of queues do not count: integers, or a single number.
            data = [t for t in tensors if t.is_floating_point() and t.numel() > 1]
            size = sum(t.numel() * t.element_size() for t in data)
            if size:
                self.sent[kind] = self.sent.get(kind, 0) + size
        elif namespace == "c10d":
            raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))


def work(folder: Path) -> None:
    engine_module.BUCKET = 10_000_000
    sent = []
    for raw in json.loads((folder / "configs.json").read_text()):
        sent.append(count(validate(raw)))
        gc.collect()
    if ranks.environment_rank()[0] == 0:
        (folder / "sent.json").write_text(json.dumps(sent))
    distributed.barrier()
    distributed.shutdown()
    ranks.leave(0)


def count(config: Config) -> dict[str, int]:
    """Return the bytes by kind of an update after the first ones, as the mean over ranks."""
    world = distributed.init(config.parallel.expert_parallel_size)
    torch.manual_seed(world.rank)
    images = torch.randn(config.data.batch_size, 3, *config.model.image_sides)
    targets = torch.randn(config.data.batch_size, config.model.num_classes).softmax(1)
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    steps = config.train.micro_steps
    engine = Engine(
        build(config.model, config.moe, world.expert), world, optimizer=config.optimizer,
        zero=config.zero, dtype=dtype, micro_batch=config.data.batch_size,
        gradient_accumulation_steps=steps,
    )  # fmt: skip
    engine.train()
    for _ in range(4):  # ZeRO-3 learns the order of the parameters in the first updates
        with Counter() as counter:
            for _ in range(steps):
                logits, aux_loss, _ = engine.forward({"images": images})
                loss = SoftTargetCrossEntropy()(logits, targets)
                engine.backward(loss if aux_loss is None else loss + aux_loss)
                engine.step()
    engine.close()
    # A rank sends back as many rows as it got, so the mean over ranks equals that of even loads.
    ranks = distributed.gather_objects(counter.sent)
    return {kind: sum(sent[kind] for sent in ranks) // len(ranks) for kind in ranks[0]}
