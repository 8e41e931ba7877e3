"""SimMIM: predict the pixels of masked patches (https://arxiv.org/abs/2111.09886)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Config, SimMIMConfig
from ..data.dataset import Batch
from ..distributed import Group, all_reduce_
from ..models import Outputs, SimMIM, SwinTransformer
from ..models.simmim import absolute_error, masked_l1_loss, masked_pixels, random_mask
from .base import Evaluation, Evaluator, Metric, StepResult, Task, whole_batch

GREY = 0.5  # level of masked pixels in pictures


class MaskedImageModelling(Task):
    """Reconstruction of images [B, C, H, W] from unmasked patches; labels are not used."""

    metrics = (Metric("loss", "val loss", higher_is_better=False),)

    def __init__(self, config: Config, rank: int = 0) -> None:
        super().__init__(config, rank)
        assert isinstance(config.task, SimMIMConfig)
        self.settings = config.task

    def check(self) -> None:
        config, settings = self.config, self.settings
        if config.model.num_classes:
            raise ValueError(
                f"model.num_classes={config.model.num_classes}, but task.name=simmim learns no "
                "classes: leave it out, or set it to 0"
            )
        for key in ("mixup", "cutmix", "label_smoothing", "random_erase"):
            if value := getattr(config.augment, key):
                raise ValueError(
                    f"augment.{key}={value:g} has no meaning with task.name=simmim: leave it out, "
                    "or set it to 0"
                )
        unit, patch = settings.mask_unit, config.model.patch_size
        if any(side % unit for side in config.model.image_sides) or unit % patch:
            height, width = config.model.image_sides
            raise ValueError(
                f"task.mask_unit={unit} must divide the image's {height} × {width} pixels and be a "
                f"multiple of model.patch_size={patch}"
            )

    def build_model(self, expert_group: Group | None = None, *, initialise: bool = True) -> SimMIM:
        config = self.config
        encoder = SwinTransformer(config.model, config.moe, expert_group, initialise=False)
        model = SimMIM(encoder, initialise=False)
        if initialise:  # draws in the same order as under ZeRO-3, see models/sharded_init.py
            model.init_weights()
        return model

    def backbone(self, model: nn.Module) -> SwinTransformer:
        assert isinstance(model, SimMIM)
        return model.encoder

    def prepare(self, batch: Batch, step: int, training: bool) -> Batch:
        images = self.normalise(batch.inputs["images"])
        if training:
            generator = self._generator(self.rank, step)
            masks = [self._mask(generator) for _ in images]
        else:  # the same on any number of ranks
            masks = [self._mask(self._generator(-1, int(index))) for index in batch.indices]
        mask = torch.stack(masks)
        if images.is_cuda:
            mask = mask.pin_memory()  # otherwise the host waits for the copy
        mask = mask.to(images.device, non_blocking=True)
        return batch._replace(inputs={"images": images, "mask": mask}, targets=images)

    def _generator(self, *place: int) -> torch.Generator:
        """Return a generator that depends only on the seed and ``place``."""
        return torch.Generator().manual_seed(hash((self.config.train.seed, *place)))

    def _mask(self, generator: torch.Generator | None = None) -> Tensor:
        height, width = self.config.model.image_sides
        return random_mask(
            height, width, patch_size=self.config.model.patch_size,
            mask_unit=self.settings.mask_unit, ratio=self.settings.mask_ratio, generator=generator,
        )  # fmt: skip

    def _error(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        size, patch = self.settings.norm_target_size, self.config.model.patch_size
        return absolute_error(outputs.predictions, batch.targets, batch.inputs["mask"], patch, size)

    def loss(self, outputs: Outputs, batch: Batch) -> StepResult:
        return StepResult(masked_l1_loss(*self._error(outputs, batch)))

    def evaluator(self, device: torch.device) -> Evaluator:
        return _MeanError(self, device)

    def example_batch(self, images: int, device: torch.device) -> Batch:
        pixels = self.images(images, device)
        mask = torch.zeros(images, *self.config.model.token_grid, dtype=torch.bool, device=device)
        return whole_batch({"images": pixels, "mask": mask}, pixels)

    def preview(self, batch: Batch) -> tuple[Tensor, list[str]]:
        pixels, captions = super().preview(batch)
        patch = self.config.model.patch_size
        mask = masked_pixels(batch.inputs["mask"].cpu(), patch, *pixels.shape[1:3])
        return pixels.masked_fill(mask.permute(0, 2, 3, 1), GREY), captions


class _MeanError(Evaluator):
    """The mean loss over all masked pixels of the held-out images."""

    def __init__(self, task: MaskedImageModelling, device: torch.device) -> None:
        self._task = task
        # Sums of absolute errors, of masked pixels times channels, and of images.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, outputs: Outputs, batch: Batch) -> None:
        error, pixels = self._task._error(outputs, batch)
        channels = error.shape[1]
        error, pixels = error[batch.valid].double(), pixels[batch.valid].double()
        self._sums += torch.stack((error.sum(), channels * pixels.sum(), batch.valid.sum()))

    def compute(self) -> Evaluation:
        error, pixels, images = all_reduce_(self._sums.clone()).tolist()
        return Evaluation({"loss": error / max(pixels, 1)}, int(images))
