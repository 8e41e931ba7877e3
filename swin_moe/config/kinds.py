"""Kinds of values: numbers within bounds that no real run comes near, and paths."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A section of a config: strict types, no unknown key, no NaN and no infinity."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False
    )


def _whole(value: Any) -> Any:
    """``1e6`` is a whole number, too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = BeforeValidator(_whole)
_LARGE = 2**31 - 1
_SIZE = 65_536

Positive = Annotated[int, Field(ge=1, le=_LARGE), _Whole]
NonNegative = Annotated[int, Field(ge=0, le=_LARGE), _Whole]
Seed = Annotated[int, Field(ge=0, lt=2**64), _Whole]
Size = Annotated[int, Field(ge=1, le=_SIZE), _Whole]  # pixels, channels, blocks, experts, …
SizeOrNone = Annotated[int, Field(ge=0, le=_SIZE), _Whole]  # 0 = none
Classes = Annotated[int, Field(ge=0, le=100_000_000), _Whole]
Images = Annotated[int, Field(ge=1, le=2**20), _Whole]  # of a batch
ImagesOrNone = Annotated[int, Field(ge=0, le=2**20), _Whole]
Workers = Annotated[int, Field(ge=0, le=4096), _Whole]

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]  # at 1 nothing would be left
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0.0, le=_SIZE)]
PositiveFactor = Annotated[float, Field(gt=0.0, le=_SIZE)]
Weight = Annotated[float, Field(ge=0.0, le=1000.0)]  # of a loss; a parameter of a distribution
Deviation = Annotated[float, Field(gt=0.0, le=10.0)]  # of initial weights
Seconds = Annotated[float, Field(ge=0.0, le=1e8)]


def check_path(value: Any, required: bool = False) -> str:
    """A path with ``~/`` expanded; an address such as ``s3://`` is unchanged.

    All other characters are those of names, blanks at the ends included.

    Raises:
        ValueError: no file can be called so.
    """
    if not isinstance(value, str):
        raise ValueError(f"expected a path, got {value!r:.60}")
    if "\0" in value:
        raise ValueError("a path cannot hold the character NUL")
    if (value or required) and not value.strip():
        raise ValueError("it is empty: name a file or a folder")
    if value != value.strip("\r\n\t\f\v"):  # of a file with other line ends, or a block of YAML
        raise ValueError(f"{value!r:.60} begins or ends with a line break or a tab: remove it")
    return os.path.expanduser(value) if re.match(r"~([^/]*/|$)", value) else value


OptionalPath = Annotated[str, AfterValidator(check_path)]  # empty = none, or a default
RequiredPath = Annotated[str, AfterValidator(lambda value: check_path(value, required=True))]
