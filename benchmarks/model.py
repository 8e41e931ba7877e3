"""Whole models: images a second in training and inference against timm, transformers, torchvision.

Swin V2 Tiny at 256 px, windows 8 and 16, batch 8, random weights, eager and compiled, in one
process under one allocator with denormals flushed (neither with --as-shipped). A training step is
forward, cross entropy, backward and fused AdamW. Contenders take turns; figures are medians.

    python -m benchmarks.model [--json PATH] [--quick] [--peers timm,transformers,torchvision]
        [--modes inference,training] [--dtypes bfloat16,float32] [--windows 8,16] [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swin_moe
from benchmarks import harness

BATCH, SIDE, CLASSES = 8, 256, 1000


def timm_model(window: int) -> nn.Module:
    import timm

    return timm.create_model(f"swinv2_tiny_window{window}_256")


def transformers_model(window: int) -> nn.Module:
    from transformers import Swinv2Config, Swinv2ForImageClassification

    config = Swinv2Config(image_size=SIDE, window_size=window, num_labels=CLASSES)
    return Swinv2ForImageClassification(config)


def torchvision_model(window: int) -> nn.Module:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[window, window],
        stochastic_depth_prob=0.2,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


def our_model(window: int) -> nn.Module:
    return swin_moe.build_model(f"swinv2_tiny_window{window}_256")


PEERS: dict[str, Callable[[int], nn.Module]] = {
    "timm": timm_model,
    "transformers": transformers_model,
    "torchvision": torchvision_model,
}


def logits(model: Callable[[Tensor], object], images: Tensor) -> Tensor:
    out = model(images)
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


def contenders(
    window: int, dtype: torch.dtype, mode: str, peers: list[str], compiled: bool
) -> dict[str, Callable[[], object]]:
    """Every model, eager and (if asked for) compiled, ready to be called."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    device = harness.device()
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=device).to(dtype)
    labels = torch.randint(CLASSES, (BATCH,), device=device)
    result: dict[str, Callable[[], object]] = {}
    builders = {name: PEERS[name] for name in peers} | {"ours": our_model}
    for name, build in builders.items():
        for kind in ("eager", "compiled") if compiled else ("eager",):
            model = build(window).to(device, dtype)
            if kind == "compiled":
                model.compile()
            make = inference(model, images)
            if mode == "training":
                make = training(model, images, labels)
            result[f"{name} {kind}"] = make
    return result


def measure(
    window: int, dtype: torch.dtype, mode: str, options: argparse.Namespace
) -> dict[str, object]:
    """Images a second of everyone, and our best against the best peer, eager and overall."""
    runs = contenders(window, dtype, mode, options.peers, not options.eager)
    times = harness.interleaved(runs, options.rounds)
    rates = {name: round(1e3 * BATCH / taken, 2) for name, taken in times.items()}
    mine = {name: rate for name, rate in rates.items() if name.startswith("ours")}
    peers = {name: rate for name, rate in rates.items() if name not in mine}
    eager = max(rate for name, rate in peers.items() if name.endswith("eager"))
    return {
        "name": f"swinv2_tiny_window{window}_256",
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "unit": "images/s",
        "ours": max(mine.values()),
        "ours_by_kind": mine,
        "peers": peers,
        "speedup": round(max(mine.values()) / max(peers.values()), 2),
        "speedup_over_eager": round(max(mine.values()) / eager, 2),
    }


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    split = partial(str.split, sep=",")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=split, default=list(PEERS))
    parser.add_argument("--modes", type=split, default=["inference", "training"])
    parser.add_argument("--dtypes", type=split, default=["bfloat16", "float32"])
    parser.add_argument("--windows", type=split, default=["8", "16"])
    parser.add_argument("--eager", action="store_true", help="leave compiled models out")
    parser.add_argument("--as-shipped", action="store_true", help="no tuned allocator, no flushing")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.dtypes, options.peers = ["8"], ["bfloat16"], ["timm"]
    if not options.as_shipped:
        harness.tuned_process()
    cells = []
    for name in options.dtypes:
        for window in map(int, options.windows):
            for mode in options.modes:
                cell = measure(window, getattr(torch, name), mode, options)
                cells.append(cell)
                print(cell, flush=True)
    rows = [
        [*(str(cell[key]) for key in ("name", "dtype", "mode")), contender, f"{rate:.1f}"]
        for cell in cells
        for contender, rate in {**cell["ours_by_kind"], **cell["peers"]}.items()  # type: ignore
    ]
    harness.report("images/s, batch 8", ["model", "dtype", "mode", "contender", "images/s"], rows)
    for cell in cells:
        print(
            f"{cell['name']} {cell['dtype']} {cell['mode']}: {cell['speedup']}x the best peer,"
            f" {cell['speedup_over_eager']}x the best eager one"
        )
    harness.write_json(options.json, cells, tuned=not options.as_shipped)


if __name__ == "__main__":
    main()
