"""Images a second of whole models, compared with timm, transformers and torchvision.

Swin V2 Tiny at 256 px, windows 8 and 16, batch 8, random weights, eager and compiled, in one
process under one allocator with denormals flushed (neither with --as-shipped). A training step is
forward, cross entropy, backward and fused AdamW. Contenders take turns; figures are medians. The
peer ``references`` is our model with the PyTorch references of its ops instead of the kernels, and
``ours blocks`` is our model with ``train.compile``.

    python -m benchmarks.model [--json PATH] [--quick] [--size tiny] [--batch N] [--device cuda]
        [--peers timm,transformers,torchvision,references] [--modes inference,training]
        [--dtypes bfloat16,float32] [--windows 8,16] [--rounds N] [--eager] [--as-shipped]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swin_moe
from benchmarks import harness, kernels
from benchmarks.kernels import Job
from swin_moe import ops
from swin_moe.models import Outputs
from swin_moe.models.graphs import BlockGraphs

BATCH, SIDE, CLASSES = 8, 256, 1000
SIZES = {  # width, depths, heads
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
}


def name_of(size: str, window: int) -> str:
    """Return the name of a model, the same in timm and here."""
    return f"swinv2_{size}_window{window}_256"


def timm_model(size: str, window: int) -> nn.Module:
    import timm

    return timm.create_model(name_of(size, window))


def transformers_model(size: str, window: int) -> nn.Module:
    from transformers import Swinv2Config, Swinv2ForImageClassification

    width, depths, heads = SIZES[size]
    config = Swinv2Config(
        image_size=SIDE,
        window_size=window,
        num_labels=CLASSES,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
    )
    return Swinv2ForImageClassification(config)


def torchvision_model(size: str, window: int) -> nn.Module:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    width, depths, heads = SIZES[size]
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        window_size=[window, window],
        stochastic_depth_prob=0.2,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


def our_model(size: str, window: int) -> nn.Module:
    return swin_moe.build_model(name_of(size, window))


PEERS: dict[str, Callable[[str, int], nn.Module]] = {
    "timm": timm_model,
    "transformers": transformers_model,
    "torchvision": torchvision_model,
    "references": our_model,
}


def logits(model: Callable[[Tensor], object], images: Tensor) -> Tensor:
    out = model(images)
    if isinstance(out, Outputs):
        return out.predictions
    return out if isinstance(out, Tensor) else out.logits  # type: ignore[attr-defined]


def inference(model: nn.Module, images: Tensor) -> Callable[[], object]:
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return logits(model, images)

    return run


def training(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits(model, images).float(), labels).backward()
        optimizer.step()

    return step


def compile_blocks(model: nn.Module, images: Tensor) -> None:
    graphs = BlockGraphs(model, print)
    with graphs.recording():
        model.train()(images)
    graphs.compile()


def with_references(run: Callable[[], object]) -> Callable[[], object]:
    """Return the same call without kernels."""

    def referring() -> object:
        with ops.assume_fused(False):
            return run()

    return referring


def contenders(
    window: int, dtype: torch.dtype, mode: str, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """Return every model, eager and perhaps compiled, ready to be called."""
    if not options.eager:
        torch._dynamo.reset()
    torch.manual_seed(0)
    device = harness.device()
    images = torch.randn(options.batch, 3, SIDE, SIDE, device=device).to(dtype)
    labels = torch.randint(CLASSES, (options.batch,), device=device)
    result: dict[str, Callable[[], object]] = {}
    builders = {name: PEERS[name] for name in options.peers} | {"ours": our_model}
    for name, build in builders.items():
        kinds = ["eager"]
        if not options.eager and name != "references":
            kinds += (
                ["compiled", "blocks"] if (name, mode) == ("ours", "training") else ["compiled"]
            )
        for kind in kinds:
            model = build(options.size, window).to(device, dtype)
            if kind == "compiled":
                model.compile()
            if kind == "blocks":
                compile_blocks(model, images)
            run = inference(model, images)
            if mode == "training":
                run = training(model, images, labels)
            result[f"{name} {kind}"] = with_references(run) if name == "references" else run
    return result


def measure(
    window: int, dtype: torch.dtype, mode: str, options: argparse.Namespace
) -> dict[str, object]:
    """Measure images a second, and compare our best with the best peer, eager and overall."""
    runs = contenders(window, dtype, mode, options)
    runs["ours"] = runs.pop("ours eager")
    times, left_out = kernels.contest(runs, options.rounds, warmup=1 if options.quick else 2)
    times["ours eager"] = times.pop("ours")
    rates = {name: round(1e3 * options.batch / taken, 2) for name, taken in times.items()}
    mine = {name: rate for name, rate in rates.items() if name.startswith("ours")}
    peers = {name: rate for name, rate in rates.items() if name not in mine}
    best = max(mine.values())
    eager = [rate for name, rate in peers.items() if name.endswith("eager")]
    return {
        "name": name_of(options.size, window),
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "unit": "images/s",
        "batch": options.batch,
        "ours": best,
        "ours_by_kind": mine,
        "peers": peers,
        "speedup": round(best / max(peers.values()), 2) if peers else None,
        "speedup_over_eager": round(best / max(eager), 2) if eager else None,
        "left_out": left_out,
    }


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    for name in options.dtypes:
        dtype = kernels.DTYPES[name]
        for window in map(int, options.windows):
            for mode in options.modes:
                make = partial(measure, window, dtype, mode, options)
                yield Job(name_of(options.size, window), dtype, mode, make, "images/s")


def show(cells: list[dict], batch: int) -> None:
    """Print a line for each contender, and our speedups."""
    rows = [
        [*(str(cell[key]) for key in ("name", "dtype", "mode")), contender, f"{rate:.1f}"]
        for cell in cells
        for contender, rate in {**cell["ours_by_kind"], **cell["peers"]}.items()
    ]
    columns = ["model", "dtype", "mode", "contender", "images/s"]
    harness.report(f"images/s, batch {batch}", columns, rows)
    for cell in cells:
        print(
            f"{cell['name']} {cell['dtype']} {cell['mode']}: {cell['speedup']}x the best peer,"
            f" {cell['speedup_over_eager']}x the best eager one"
        )


def main() -> None:
    others = [name for name in PEERS if name != "references"]
    parser = kernels.arguments(__doc__ or "", others, 5, ["bfloat16", "float32"])
    split = partial(str.split, sep=",")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--modes", type=split, default=["inference", "training"])
    parser.add_argument("--windows", type=split, default=["8", "16"])
    parser.add_argument("--eager", action="store_true", help="leave compiled models out")
    parser.add_argument("--as-shipped", action="store_true", help="no tuned allocator, no flushing")
    options = parser.parse_args()
    kernels.need("pydantic", "fairscale")
    options.batch = options.batch or BATCH
    if options.quick:
        options.windows, options.dtypes = options.windows[:1], options.dtypes[:1]
        options.peers = options.peers if options.peers != others else ["timm"]
    kernels.start(options, tuned=not options.as_shipped)
    cells = list(kernels.measured(jobs(options), options, tuned=not options.as_shipped))
    able = [cell for cell in cells if "error" not in cell]
    show(able, options.batch)
    if len(able) < len(cells):
        raise SystemExit(f"{len(cells) - len(able)} of {len(cells)} cells failed")


if __name__ == "__main__":
    main()
