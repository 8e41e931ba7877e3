"""The description of a model in a file of weights: config, classes, preparation of images."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.reading import parse_json, read_json
from ..common.text import plain
from ..config import Architecture, Config, ConfigError, validate_architecture
from ..config.variants import VARIANTS
from .adapters import Images
from .file_kind import WeightsError

_MODEL, _CLASSES, _IMAGES = "swin_moe", "classes", "images"  # keys of our files' metadata


@dataclass
class Described:
    """The description that a file contains; None for absent parts.

    Attributes:
        config: of the model, in our own files.
        classes: names by label, not yet checked against the head.
        images: their preparation for the model.
        foreign: content of a ``config.json`` in the same folder (Hugging Face, timm).
        notes: lines on parts that cannot be used.
    """

    config: Architecture | None = None
    classes: list[str] | None = None
    images: Images | None = None
    foreign: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def metadata(config: Architecture | None, about: Described) -> dict[str, str]:
    """Return the metadata of our files: JSON texts by key."""
    texts: dict[str, str] = {}
    if config is not None:
        sections = {"model": config.model.model_dump(), "moe": config.moe.model_dump()}
        texts[_MODEL] = json.dumps(sections)
    if about.classes is not None:
        texts[_CLASSES] = json.dumps(about.classes)
    if about.images is not None:
        texts[_IMAGES] = json.dumps(about.images._asdict())
    return texts


def from_metadata(texts: Mapping[Any, Any], path: Path) -> Described:
    """Read the result of :func:`metadata`; foreign files may use the same keys for other data.

    Raises:
        WeightsError: the model cannot be read.
    """
    about = Described()
    if isinstance(text := texts.get(_MODEL), str):
        try:
            sections = parse_json(text, f"{plain(path)}: its metadata")
            if not isinstance(sections, dict):
                raise ConfigError("it holds no sections")
            about.config = validate_architecture(sections, source=plain(path))
        except ConfigError as error:
            raise WeightsError(f"{plain(path)}: its metadata cannot be read ({error})") from None
        except ValueError as error:
            raise WeightsError(str(error)) from None
    names = _value(texts.get(_CLASSES))
    if names is not None:
        _take_names(about, names, f"{plain(path)}: classes in its metadata")
    images = _value(texts.get(_IMAGES))
    if isinstance(images, dict):
        about.images = _images(images.get("mean"), images.get("std"), images.get("crop"))
    return about


def images_of(config: Config) -> Images:
    """Return how a run of ours prepares images for evaluation."""
    return Images(config.data.mean, config.data.std, config.augment.eval_crop)


def _value(text: object) -> Any:
    if not isinstance(text, str):
        return None
    try:
        return parse_json(text, "metadata")
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------
# Files of other programs in the weights' folder


def from_folder(folder: Path) -> Described:
    """Read ``config.json`` and ``preprocessor_config.json`` of transformers and timm."""
    about = Described()
    about.foreign = config = _json_file(folder / "config.json", about.notes)
    processor = _json_file(folder / "preprocessor_config.json", about.notes)
    where = f"class names in {plain(folder / 'config.json')}"
    timm = config.get("pretrained_cfg", config if "architecture" in config else None)
    timm = timm if isinstance(timm, dict) else {}
    labels = config.get("label_names") or timm.get("label_names", timm.get("labels"))
    if "id2label" in config:
        names = _by_number(config["id2label"])
        if names is None or not all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names):
            _take_names(about, names, where)
    elif labels is not None:
        _take_names(about, labels, where)
    if timm:
        about.images = _images(timm.get("mean"), timm.get("std"), timm.get("crop_pct"))
    elif processor:
        crop = _ratio(processor.get("crop_size"), processor.get("size"))
        about.images = _images(processor.get("image_mean"), processor.get("image_std"), crop)
    return about


def timm_model(stated: dict[str, Any]) -> dict[str, Any]:
    """Return window and image size of the model that timm's ``config.json`` names."""
    name = str(stated.get("architecture", "")).partition(".")[0]
    known = (f"{name}{suffix}" for suffix in ("", "_22k", "_22kto1k"))
    variant = next((VARIANTS[variant]["model"] for variant in known if variant in VARIANTS), {})
    keys = ("img_size", "window_size", "pretrained_window_sizes")
    model = {key: variant[key] for key in keys if key in variant}
    arguments = stated.get("model_args")
    if isinstance(arguments, dict):
        model |= {key: arguments[key] for key in keys if arguments.get(key) is not None}
    return model


def _json_file(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{plain(path)} is not used: {error}")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{plain(path)} is not used: it is not a JSON object")
        return {}
    return content


def _by_number(names: object) -> list[object] | None:
    """Return ``{"0": "cat", "1": "dog"}`` as a list; None if a number is missing."""
    if not isinstance(names, dict):
        return None
    by_number = {str(number): name for number, name in names.items()}
    numbers = [str(number) for number in range(len(by_number))]
    return [by_number[n] for n in numbers] if by_number.keys() == set(numbers) else None


def _take_names(about: Described, names: object, where: str) -> None:
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        about.classes = names
    else:
        about.notes.append(f"{where} are not used: they are not a list of names by label")


def _images(mean: object, std: object, crop: object) -> Images | None:
    def numbers(value: object) -> list[float]:
        good = isinstance(value, list) and all(isinstance(n, (int, float)) for n in value)
        return [float(n) for n in value] if good else []  # type: ignore[attr-defined]

    means, stds = numbers(mean), numbers(std)
    if not means or len(means) != len(stds) or min(stds) <= 0:
        return None
    share = float(crop) if isinstance(crop, (int, float)) and 0 < crop <= 1 else Images().crop
    return Images(means, stds, share)


def _ratio(crop: object, size: object) -> float | None:
    """Return a crop's share of the shorter side."""
    try:
        return float(crop["height"]) / float(size["shortest_edge"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
