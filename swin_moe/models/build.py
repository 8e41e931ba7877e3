"""From a name or a config to a model."""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import (
    KNOWN,
    ConfigError,
    ModelConfig,
    MoEConfig,
    refuse_dense,
    unknown_model,
    validate_architecture,
)
from ..distributed import Group
from ..variants import VARIANTS
from .pretrained import adopt_pretrained_window, load_pretrained, read_pretrained
from .swin import MoEOutput, SwinTransformer

log = logging.getLogger("swin_moe")


def build(model: ModelConfig, moe: MoEConfig, expert_group: Group | None = None) -> SwinTransformer:
    """The model of two config sections; weights are drawn from torch's global generator."""
    return SwinTransformer(model, moe, expert_group)


def build_model(name: str, **overrides: Any) -> SwinTransformer:
    """A model by name, e.g. ``build_model("swinv2_tiny_window8_256", num_classes=10)``.

    Overrides are keys of the config section ``model``, or of ``moe`` as ``moe={"top_k": 2}``. With
    ``pretrained=PATH`` the weights are those of a file, of any dialect that ``swin-moe convert``
    reads, fitted to this image size, window and number of classes. Otherwise they are drawn from
    torch's global generator. Under ``torch.device("meta")`` a model of any size takes no memory;
    ``model.to_empty(device=...)`` and ``model.init_weights()`` then make it real.

    Raises:
        ConfigError: unknown name or key, or a value of the wrong kind.
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
    """Tuples as lists and paths as text, as a config has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern, e.g. ``swin_moe*``."""
    return sorted(name for name in VARIANTS if fnmatch(name, pattern))


def split_output(output: Tensor | MoEOutput) -> tuple[Tensor, MoEOutput | None]:
    """Logits, and the whole output where the model has MoE layers."""
    return (output.logits, output) if isinstance(output, MoEOutput) else (output, None)


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that hold this rank's experts only ([E_local, ...])."""
    return {name for name, _ in model.named_parameters() if ".experts." in name}
