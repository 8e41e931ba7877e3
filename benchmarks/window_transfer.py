"""Accuracy of a model at windows larger than the one that it was trained with, without fine-tuning.

A small Swin V2 and a Swin V1 learn the bundled Fashion-MNIST at 32 pixels and window 4. Their
weights then load at larger images and windows, as table 1 of https://arxiv.org/abs/2111.09883 does:
V2 by its log-spaced coordinates with the pretrained window (and, to compare, without it), V1 by
bicubic bias tables.

    python benchmarks/window_transfer.py [--json PATH] [--quick]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from swin_moe import build_model
from swin_moe.config import Architecture, AugmentConfig, DataConfig, ModelConfig, MoEConfig
from swin_moe.data import Loader, build_loader
from swin_moe.data.normalise import Normalise
from swin_moe.models import SwinTransformer
from swin_moe.training.optim import parameter_groups
from swin_moe.weights.files import write

SHAPE = {"patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depths": [2, 2],
         "num_heads": [2, 4], "mlp_ratio": 2.0, "drop_path_rate": 0.0}  # fmt: skip
TRAINED = (32, 4)
TARGETS = [(32, 4), (40, 5), (48, 6), (64, 8), (96, 12), (128, 16)]  # pixels, window
# Crops of other scales, as in the ImageNet recipes: they teach a network to stand larger images.
CROPS = AugmentConfig(scale=[0.2, 1.0], ratio=[1.0, 1.0], color_jitter=0.0, auto_augment="",
                      random_erase=0.0, eval_crop=1.0)  # fmt: skip


NORMALISE = Normalise([0.286], [0.353])


def loader(pixels: int, training: bool) -> Loader:
    data = DataConfig(batch_size=50, eval_batch_size=125, num_workers=0, mean=[0.286], std=[0.353])
    return build_loader(data, CROPS, image_sides=(pixels, pixels), in_chans=1, num_classes=10,
                        training=training, rank=0, world_size=1, seed=0)  # fmt: skip


def train(family: str, steps: int) -> SwinTransformer:
    """A model trained with AdamW and a one-cycle schedule at the small window."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    pixels, window = TRAINED
    config = ModelConfig(family=family, img_size=pixels, window_size=window, **SHAPE)  # type: ignore[arg-type]
    model = SwinTransformer(config, MoEConfig())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    batches = loader(pixels, training=True)
    for step in track(range(steps), f"training {family}", console=Console(stderr=True)):
        if step % len(batches) == 0:
            epoch = batches.epoch(step // len(batches))
        batch = next(epoch)
        images, labels = NORMALISE(batch.inputs["images"]), batch.targets
        loss = F.cross_entropy(model(images).predictions, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: SwinTransformer, images: int, pixels: int) -> float:
    """Top-1 in percent on the first ``images`` held-out ones."""
    right = seen = 0
    batches = loader(pixels, training=False)
    for batch in batches.epoch(0):
        held_out, labels = NORMALISE(batch.inputs["images"]), batch.targets
        right += int((model.eval()(held_out).predictions.argmax(1) == labels).sum())
        seen += len(labels)
        if seen >= images:
            break
    return 100 * right / seen


def transferred(weights: Path, family: str, pixels: int, window: int, own: bool) -> SwinTransformer:
    """The trained weights in a model for other images and windows.

    Args:
        own: V2 only: scale the coordinates to the new window, as if it had been trained with it.
    """
    sizes = {"pretrained_window_sizes": [0, 0]} if own else {}
    return build_model(
        family, pretrained=str(weights), img_size=pixels, window_size=window, **SHAPE, **sizes
    )


def measure(steps: int, images: int, targets: list[tuple[int, int]]) -> list[dict[str, object]]:
    """One cell per target: accuracy of V2, of V2 without the pretrained window, of V1."""
    cells: list[dict[str, object]] = [
        {"name": f"{pixels} px, window {window}", "unit": "% top-1"} for pixels, window in targets
    ]
    for family in ("swinv2", "swin"):
        model = train(family, steps)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "trained.safetensors"
            config = Architecture(model=model.config)
            write(weights, dict(model.named_parameters()), config)
            for cell, (pixels, window) in zip(cells, targets, strict=True):
                moved = transferred(weights, family, pixels, window, own=False)
                cell[family] = accuracy(moved, images, pixels)
                if family == "swinv2":
                    moved = transferred(weights, family, pixels, window, own=True)
                    cell["swinv2, own coordinates"] = accuracy(moved, images, pixels)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a shorter training, fewer targets")
    arguments = parser.parse_args()
    cells = measure(200, 500, TARGETS[::3]) if arguments.quick else measure(3000, 2000, TARGETS)
    kinds = ["swinv2", "swinv2, own coordinates", "swin"]
    table = Table(title=f"trained at {TRAINED[0]} px, window {TRAINED[1]}; top-1 in %")
    for column in ("evaluated at", *kinds):
        table.add_column(column, justify="right")
    for cell in cells:
        table.add_row(str(cell["name"]), *(f"{cell[kind]:.1f}" for kind in kinds))
    Console().print(table)
    if arguments.json:
        versions = {"torch": torch.__version__}
        content = {"versions": versions, "machine": {"cpu": platform.machine()}, "cells": cells}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
