"""A hundred updates of a Swin V2 MoE by the training engine at ZeRO-1 in bf16, with the kernels.

The batch is the same in each update, so that the loss must fall. A few updates with the references
follow, for the ratio. Not run where DeepSpeed or pydantic is missing.

    python -m benchmarks.first_contact.engine [--device cuda] [--batch N] [--updates N]
"""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F

from benchmarks import harness, kernels
from benchmarks.first_contact import options as common
from swin_moe import ops

MODEL = "swinv2_moe_small_8expert_window12_192_22k"
TOY = {
    "img_size": 32, "window_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2],
    "num_classes": 10, "moe": {"blocks": [[], [0]], "num_experts": 4},
}  # fmt: skip
NEEDED = ("deepspeed", "pydantic", "fairscale", "hjson")
PEER_UPDATES = 10
RATE = 2e-4


class Training:
    """An engine, a batch of random images, and the times of its updates."""

    def __init__(self, device: str, batch: int, toy: bool) -> None:
        from swin_moe import distributed
        from swin_moe.config import OptimizerConfig, ZeroConfig

        world = distributed.init()
        from swin_moe import build_model
        from swin_moe.training.engine import (
            Engine,  # imports DeepSpeed, which looks at what init has set
        )

        distributed.seed_everything(0)
        model = build_model(MODEL, **(TOY if toy else {"num_classes": 1000}))
        dtype = torch.bfloat16
        self.engine = Engine(
            model, world, optimizer=OptimizerConfig(base_lr=RATE * 512 / batch),
            zero=ZeroConfig(stage=1), dtype=dtype, micro_batch=batch, gradient_accumulation_steps=1,
        )  # fmt: skip
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = RATE
        config = model.config
        self.images = torch.randn(batch, config.in_chans, *config.image_sides, device=device)
        self.labels = torch.randint(config.num_classes, (batch,), device=device)
        self.losses: list[torch.Tensor] = []

    def update(self) -> None:
        outputs = self.engine.forward({"images": self.images})
        loss = F.cross_entropy(outputs.predictions, self.labels)
        self.engine.backward(loss if outputs.aux_loss is None else loss + outputs.aux_loss)
        self.engine.step()
        self.losses.append(loss.detach())

    def updates(self, count: int) -> float:
        """Return the median milliseconds of an update."""
        times = [1e3 * harness.seconds(self.update) for _ in range(count)]
        return statistics.median(times)

    def close(self) -> None:
        from swin_moe import distributed

        self.engine.close()
        distributed.shutdown()


def learnt(losses: list[float]) -> bool:
    """Return whether the loss is always finite, and lower in the last tenth than in the first."""
    part = max(len(losses) // 10, 1)
    first, last = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
    return all(map(math.isfinite, losses)) and last < first


def peak_gib(device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--updates", type=int, default=100)
    options = parser.parse_args()
    kernels.need(*NEEDED)
    harness.choose_device(options.device)
    ops.trust_kernels()
    training = Training(options.device, options.batch, options.quick)
    ours = training.updates(options.updates)
    losses = [loss.item() for loss in training.losses]
    peak = peak_gib(options.device)
    shown = [round(loss, 4) for loss in (*losses[:: max(len(losses) // 10, 1)], losses[-1])]
    print(f"{options.updates} updates, {ours:.1f} ms each, losses {shown}", flush=True)
    with ops.assume_fused(False):
        peer = training.updates(2 if options.quick else PEER_UPDATES)
    cell = harness.cell(
        f"{MODEL}, batch {options.batch}", torch.bfloat16, "update, ZeRO-1",
        {"ours": ours, "references": peer}, updates=options.updates,
    )  # fmt: skip
    common.write(options, cells=[cell], losses=shown, peak_gib=peak)
    print("  ".join(harness.row(cell)))
    training.close()
    if not learnt(losses):
        raise SystemExit(f"the loss does not fall: {shown}")


if __name__ == "__main__":
    main()
