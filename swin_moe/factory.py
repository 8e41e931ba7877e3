"""Models by name, such as ``swin_moe.build_model``, with initial weights or those of a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from .config import KNOWN, ConfigError, refuse_dense, unknown_model, validate_architecture
from .config.variants import VARIANTS
from .models import SwinFeatures, SwinTransformer, build
from .models.backbone import OutputFormat
from .weights.pretrained import adopt_pretrained_window, load_pretrained, read_pretrained

log = logging.getLogger("swin_moe")


def build_model(name: str, **overrides: Any) -> SwinTransformer:
    """Build a model by name, e.g. ``build_model("swinv2_tiny_window8_256", num_classes=10)``.

    Overrides are keys of the config section ``model``, or of ``moe`` as ``moe={"top_k": 2}``. With
    ``pretrained=PATH`` the weights come from a file in any format that ``swin-moe convert`` reads,
    adapted to this image size, window and number of classes. Otherwise they are drawn from torch's
    global generator. Under ``torch.device("meta")`` a model of any size takes no memory;
    ``model.to_empty(device=...)`` and ``model.init_weights()`` then make it real.

    Raises:
        ConfigError: a name or key is unknown, or a value has the wrong type.
    """
    if name not in KNOWN:
        raise ConfigError(unknown_model(name))
    overrides = _plain(overrides)
    moe = overrides.pop("moe", {})
    stated = {"model": {"name": name, **overrides}, "moe": moe}
    config = validate_architecture(stated, source=name)
    refuse_dense(config, stated, {}, source=name)
    if not config.model.pretrained:
        return build(config.model, config.moe)
    if torch.empty(0).is_meta:
        raise ConfigError(f"{name}: pretrained has no effect under torch.device('meta')")
    source = read_pretrained(Path(config.model.pretrained))
    built = build(adopt_pretrained_window(config.model, source), config.moe)
    done = load_pretrained(built, source)
    if "re-initialised" in done or source.notes:
        log.warning("%s: %s", config.model.pretrained, done)
    return built


def _plain(value: Any) -> Any:
    """Turn tuples into lists and paths into text, as in a config."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def list_models(pattern: str = "*") -> list[str]:
    """List the models whose names match a shell-style pattern, e.g. ``swin_moe*``."""
    return sorted(name for name in VARIANTS if fnmatch(name, pattern))


def build_features(
    name: str,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    *,
    output_format: OutputFormat = "NCHW",
    frozen_stages: int = -1,
    freeze_moe: bool = False,
    **overrides: Any,
) -> SwinFeatures:
    """Build the feature maps of a model by name; ``overrides`` as in :func:`build_model`."""
    return SwinFeatures(
        build_model(name, num_classes=0, **overrides),
        out_indices,
        output_format=output_format,
        frozen_stages=frozen_stages,
        freeze_moe=freeze_moe,
    )
