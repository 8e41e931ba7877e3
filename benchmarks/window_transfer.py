"""Accuracy of a model at windows larger than that of its training, without fine-tuning.

A small Swin V2 and a Swin V1 learn the bundled Fashion-MNIST at 32 pixels and window 4. Their
weights then load at larger images and windows, as in table 1 of https://arxiv.org/abs/2111.09883:
V2 by its log-spaced coordinates with the pretrained window (and, to compare, without it), V1 by
bicubic bias tables.

    python -m benchmarks.window_transfer [--json PATH] [--quick]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from benchmarks import harness
from swin_moe import build_model
from swin_moe.config import Architecture, AugmentConfig, DataConfig, ModelConfig, MoEConfig
from swin_moe.data import Loader, loader_of
from swin_moe.data.normalise import Normalise
from swin_moe.models import SwinTransformer
from swin_moe.training.optim import parameter_groups
from swin_moe.weights.files import write
from tests.data.helpers import loading

SHAPE = {"patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depths": [2, 2],
         "num_heads": [2, 4], "mlp_ratio": 2.0, "drop_path_rate": 0.0}  # fmt: skip
OWN = "swinv2, own coordinates"
PEERS = (OWN, "swin")
TRAINED = (32, 4)
TARGETS = [(32, 4), (40, 5), (48, 6), (64, 8), (96, 12), (128, 16)]  # pixels, window
# Crops of several scales, as in the ImageNet recipes: the model learns to accept larger images.
CROPS = AugmentConfig(scale=[0.2, 1.0], ratio=[1.0, 1.0], color_jitter=0.0, auto_augment="",
                      random_erase=0.0, eval_crop=1.0)  # fmt: skip


NORMALISE = Normalise([0.286], [0.353])


def loader(pixels: int, training: bool) -> Loader:
    data = DataConfig(batch_size=50, eval_batch_size=125, num_workers=0, mean=[0.286], std=[0.353])
    return loader_of(loading(data, CROPS, img_size=pixels, in_chans=1, num_classes=10), training)


def train(family: str, steps: int) -> SwinTransformer:
    """Train a model at the small window, with AdamW and a one-cycle schedule."""
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
    """Return the top-1 accuracy in percent on the first ``images`` held-out images."""
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
    """Load the trained weights into a model for other images and windows.

    Args:
        own: V2 only: scale the coordinates to the new window, as if it were that of the training.
    """
    sizes = {"pretrained_window_sizes": [0, 0]} if own else {}
    return build_model(
        family, pretrained=str(weights), img_size=pixels, window_size=window, **SHAPE, **sizes
    )


def measure(steps: int, images: int, targets: list[tuple[int, int]]) -> list[dict[str, object]]:
    """Return a cell per target: V2, and as peers V2 without the pretrained window, and V1."""
    cells = [
        harness.figure(f"{pixels} px, window {window}", "% top-1", None, mode="evaluation")
        for pixels, window in targets
    ]
    for family in ("swinv2", "swin"):
        model = train(family, steps)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "trained.safetensors"
            config = Architecture(model=model.config)
            write(weights, dict(model.named_parameters()), config)
            for cell, (pixels, window) in zip(cells, targets, strict=True):
                peers = cell["peers"]
                assert isinstance(peers, dict)
                moved = transferred(weights, family, pixels, window, own=False)
                if family == "swinv2":
                    cell["ours"] = accuracy(moved, images, pixels)
                    moved = transferred(weights, family, pixels, window, own=True)
                    peers[OWN] = accuracy(moved, images, pixels)
                else:
                    peers["swin"] = accuracy(moved, images, pixels)
    return cells


def main() -> None:
    options = harness.arguments(__doc__ or "").parse_args()
    cells = measure(200, 500, TARGETS[::3]) if options.quick else measure(3000, 2000, TARGETS)
    rows = [
        [str(cell["name"]), f"{cell['ours']:.1f}", *(f"{cell['peers'][k]:.1f}" for k in PEERS)]  # type: ignore[index]
        for cell in cells
    ]
    title = f"trained at {TRAINED[0]} px, window {TRAINED[1]}; top-1 in %"
    harness.report(title, ["evaluated at", "swinv2", *PEERS], rows)
    harness.write_json(options.json, cells)


if __name__ == "__main__":
    main()
