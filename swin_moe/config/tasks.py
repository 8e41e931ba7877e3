"""The sections of ``task:``; its key ``name`` chooses one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from . import kinds
from .kinds import NonNegative, Section


class ClassificationConfig(Section):
    """A class per image; ``augment`` has mixup, CutMix and label smoothing."""

    name: Literal["classification"] = "classification"
    mixes_images: ClassVar[bool] = True
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}


class SimMIMConfig(Section):
    """Masked image modelling (https://arxiv.org/abs/2111.09886).

    ``mask_unit`` is the side of the masked squares, in pixels. ``norm_target_size`` is the side of
    the neighbourhood that normalises a target pixel; 0 = none. A side
    of 1 would make every target 0.
    """

    name: Literal["simmim"] = "simmim"
    mask_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
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

    @field_validator("norm_target_size")
    @classmethod
    def _has_a_centre(cls, size: int) -> int:
        if size == 1 or (size and size % 2 == 0):
            raise ValueError(f"{size} must be odd and at least 3, or 0 for plain pixels")
        return size


TASKS: dict[str, type[ClassificationConfig] | type[SimMIMConfig]] = {
    "classification": ClassificationConfig,
    "simmim": SimMIMConfig,
}
TaskConfig = Annotated[ClassificationConfig | SimMIMConfig, Field(discriminator="name")]
