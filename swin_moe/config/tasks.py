"""The sections that ``task:`` may be: what is learned. ``name`` chooses one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from . import kinds
from .kinds import NonNegative, Rate, Section


class ClassificationConfig(Section):
    """A class per image; ``augment`` has mixup, CutMix and label smoothing."""

    name: Literal["classification"] = "classification"
    mixes_images: ClassVar[bool] = True
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}


class SimMIMConfig(Section):
    """Masked image modelling (https://arxiv.org/abs/2111.09886).

    ``mask_unit`` is the side in pixels of the squares that are masked as a whole.
    ``norm_target_size`` is the side of the neighbourhood that normalises a target pixel; 0 = none.
    """

    name: Literal["simmim"] = "simmim"
    mask_ratio: Rate = 0.6
    mask_unit: kinds.Size = 32
    norm_target_size: NonNegative = 47
    mixes_images: ClassVar[bool] = False
    # The defaults of other sections under this task.
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "model": {"num_classes": 0},
        "augment": {
            "scale": [0.67, 1.0],
            "auto_augment": "",
            "color_jitter": 0.0,
            "random_erase": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
            "label_smoothing": 0.0,
        },
    }

    @model_validator(mode="after")
    def _check(self) -> SimMIMConfig:
        if self.norm_target_size and self.norm_target_size % 2 == 0:
            raise ValueError(f"norm_target_size={self.norm_target_size} must be odd, or 0")
        return self


TASKS: dict[str, type[ClassificationConfig] | type[SimMIMConfig]] = {
    "classification": ClassificationConfig,
    "simmim": SimMIMConfig,
}
TaskConfig = Annotated[ClassificationConfig | SimMIMConfig, Field(discriminator="name")]
