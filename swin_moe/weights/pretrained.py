"""Pretrained weights: read, translate, fit and load them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import persistent_buffers
from ..common.text import plain
from ..config import Architecture, ModelConfig, validate_architecture
from ..config.variants import VARIANTS
from ..data.names import finder, other_numbers
from ..models.swin import SwinTransformer
from ..moe.experts import ExpertLinear
from .adapters import Images, Translation, computes_otherwise, detect, to_swin_moe
from .described import Described, timm_model
from .files import State, WeightsError, read
from .transfer import HEAD, fit, infer_model
from .wrappers import not_read

log = logging.getLogger("swin_moe")

EXPERT_BIAS = "choice_bias.rises"
MASK_TOKEN = "mask_token"  # SimMIM adds it to the backbone
# Buffers of other programs that are computed here, and biases that our layers lack.
_COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask",
             "_num_global_experts", "batched_fc2_bias")  # fmt: skip


@dataclass
class Pretrained:
    """Weights under our names, and the facts about their model.

    Attributes:
        translation: of the names and tensors.
        dialect: of the file.
        config: of the file's model, with defaults for unknown keys.
        window_known: whether the file states its window.
        own: whether the file is ours and also states its routing.
        path: of the file.
        class_names: of the head's classes, by label; None if the file does not state them.
        images: their preparation for the model, None if the file does not state it.
        notes: lines on other content of the file, and on parts that cannot be used.
    """

    translation: Translation
    dialect: str
    config: Architecture
    window_known: bool
    own: bool
    path: Path
    class_names: list[str] | None = None
    images: Images | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> State:
        return self.translation.state


def read_pretrained(path: Path, dialect: str = "auto", network: str = "") -> Pretrained:
    """Read weights of any dialect.

    Args:
        path: see :func:`.files.read`.
        dialect: of the names; ``auto`` = detect it.
        network: prefix of its names in a file that holds several.

    Raises:
        ValueError: the file is damaged, of another dialect, or no Swin; one line for the user.
    """
    weights = read(path, network)
    about = weights.about
    try:
        if dialect == "auto":
            dialect = "swin_moe" if about.config else detect(weights.state)
        translation = to_swin_moe(weights.state, dialect)
        _check_numbers(translation.state)
        if about.config is not None:
            raw = about.config.model_dump()
            model, moe = raw["model"], raw["moe"]
        else:
            model, moe = infer_model(translation.state, translation.dropped)
            model |= _huggingface_model(about.foreign) | timm_model(about.foreign)
    except ValueError as error:
        raise WeightsError(f"{plain(path)}: {error}") from None
    model["pretrained"] = ""  # the initial weights of the file's own run do not matter here
    config = validate_architecture({"model": model, "moe": moe}, source=plain(path))
    _check_positions(translation.state, config.model, path)
    parts = [name for name in translation.dropped if not name.endswith(_COMPUTED)]
    about.notes += not_read(parts, path)
    if about.config is None and "img_size" in model:  # it states the size of training
        about.notes += filter(None, [computes_otherwise(dialect, config.model)])
    return Pretrained(
        translation,
        dialect,
        config,
        window_known="window_size" in model,
        own=about.config is not None,
        path=path,
        class_names=_names_of_head(about, config.model.num_classes, path),
        images=about.images,
        notes=about.notes,
    )


def _check_numbers(state: State) -> None:
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not name.endswith(EXPERT_BIAS):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(f"'{name}' holds {kind} numbers: quantised weights are not read")


def _check_positions(state: State, model: ModelConfig, path: Path) -> None:
    if "absolute_pos_embed" not in state:
        return
    positions, grid = state["absolute_pos_embed"].shape[1], math.prod(model.token_grid)
    if positions == grid:
        return
    why = "; for rectangular images, the file must state their size"
    if positions == grid + 1 and model.family == "swinv2":
        why = ": one is for a class token, with which transformers' Swinv2 itself cannot run"
    height, width = model.image_sides
    raise WeightsError(
        f"{plain(path)}: absolute_pos_embed has {positions} positions, images of {height} x "
        f"{width} pixels have {grid}{why}"
    )


def not_finite(state: State) -> str:
    """Return a note on weights that are NaN or infinite, or ``""``."""
    found = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if not found:
        return ""
    return f"{len(found)} of {len(state)} tensors hold NaN or infinity, first '{found[0]}'"


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # fp8 lacks most operations
    return bool(torch.stack(wide.aminmax()).isfinite().all())


def _names_of_head(about: Described, classes: int, path: Path) -> list[str] | None:
    """Return the file's class names if they are as many as the head's classes.

    A run of ours may have fewer, if ``model.num_classes`` leaves room.
    """
    names = about.classes
    if names is None or len(names) == classes or (about.config and len(names) < classes):
        return names
    about.notes.append(
        f"the class names of {plain(path)} are not used: {len(names):,} names, and a head for "
        f"{classes:,} classes"
    )
    return None


def _huggingface_model(stated: dict[str, object]) -> dict[str, object]:
    """Return the keys of ``model`` that ``config.json`` states and tensors do not show.

    Raises:
        WeightsError: it has a value that the family does not support.
    """
    for key, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-5)):
        if stated.get(key, value) != value:
            raise WeightsError(f"its config.json has {key}={stated[key]!r}, ours is {value}")
    keys = {"img_size": "image_size", "window_size": "window_size"}
    model = {ours: stated[theirs] for ours, theirs in keys.items() if theirs in stated}
    sizes = stated.get("pretrained_window_sizes")
    if isinstance(sizes, list) and any(sizes):
        model["pretrained_window_sizes"] = sizes
    return model


def adopt_pretrained_window(model: ModelConfig, source: Pretrained) -> ModelConfig:
    """Set ``pretrained_window_sizes`` of a V2 model whose window differs from the file's.

    If the config leaves them empty, they become the file's windows, or those of the config's
    variant if the file does not state its own (timm's files do not).
    """
    theirs = source.config.model
    if model.family not in ("swinv2", "swin_moe") or model.pretrained_window_sizes:
        return model
    if len(theirs.depths) != len(model.depths):
        return model  # the weights will not fit, which is reported later
    if not source.window_known:
        name = model.name if model.name in VARIANTS else ""
        theirs = validate_architecture({"model": {"name": name}}, name).model if name else model
        theirs = theirs if len(theirs.depths) == len(model.depths) else model
        log.warning(
            "%s does not state its window: %d is assumed, %s's; if it was trained at another one, "
            "set model.pretrained_window_sizes",
            plain(source.path),
            theirs.window_size,
            name or "model.window_size",
        )
    sizes = theirs.pretrained_window_sizes
    sizes = sizes if any(sizes) else built_windows(theirs)
    if sizes == built_windows(model):
        return model
    return model.model_copy(update={"pretrained_window_sizes": sizes})


def built_windows(model: ModelConfig) -> list[int]:
    """Return the window of each stage, clipped to the grid."""
    stages = range(len(model.depths))
    grids = [min(-(-side // 2**stage) for side in model.token_grid) for stage in stages]
    return [min(grid, model.window_size) for grid in grids]


@torch.no_grad()
def load_pretrained(
    model: SwinTransformer, source: Pretrained, classes: list[str] | None = None
) -> str:
    """Copy weights into a model, and of the experts this rank's share.

    The bias on the choice of experts is copied if both have one, see
    ``moe.expert_bias_update_rate``.

    Args:
        classes: names of the model's classes. If the file has names too, the head's rows are
            matched by name; a head that lacks a class keeps the model's initialisation.

    Returns:
        the result, in one line.

    Raises:
        WeightsError: the file has too many or too few tensors, apart from a head.
    """
    try:
        return "; ".join([_load(model, source, classes), *source.notes])
    except WeightsError as error:
        raise WeightsError(misfit(source, model.config, str(error))) from None


def misfit(source: Pretrained, model: ModelConfig, why: str) -> str:
    """Return one line on weights that do not fit: which file and model, and how they differ."""
    theirs = source.config.model
    keys = ("family", "embed_dim", "depths", "num_heads")
    other = [
        f"{key}={getattr(theirs, key)}"
        for key in keys
        if getattr(theirs, key) != getattr(model, key)
    ]
    held = f"; the file's model has {' '.join(other)}" if other else ""
    name = model.name or model.family
    return f"{plain(source.path)} does not fit {name}: {why}{held}"


def _load(model: SwinTransformer, source: Pretrained, classes: list[str] | None) -> str:
    buffers = persistent_buffers(model)
    target = {**dict(model.named_parameters()), **buffers}
    target.pop(MASK_TOKEN, None)
    state = {n: t for n, t in source.state.items() if n in target or not n.endswith(EXPERT_BIAS)}
    _warn_of_other_routing(model, source)
    state, head = head_by_name(state, source.class_names, classes)
    for name in [name for name in state if ".experts." in name and name in target]:
        layer = model.get_submodule(name.rpartition(".")[0])
        if len(state[name]) != model.moe.num_experts:
            raise WeightsError(
                f"{name}: the file has {len(state[name])} experts, moe.num_experts is "
                f"{model.moe.num_experts}"
            )
        assert isinstance(layer, ExpertLinear)
        state[name] = layer.share.of(name, state[name])
    grids = source.config.model.token_grid, model.config.token_grid
    result = fit(state, {name: p.data for name, p in target.items()}, *grids)
    missing = [n for n in result.missing if n not in HEAD and n not in buffers]
    extra = [*source.translation.unknown, *result.left_over]
    other_head = [name for name in extra if name.startswith("head.") and HEAD[0] not in state]
    extra = [name for name in extra if name not in (*HEAD, *other_head)]
    if missing or extra:
        raise WeightsError(explain_difference(missing, extra))
    for name, tensor in result.state.items():
        target[name].copy_(tensor)
    notes = [f"{len(result.state)} tensors of {source.dialect} names"]
    if result.resized:
        notes.append(f"{len(result.resized)} resized")
    if HEAD[0] in state and result.head:  # otherwise `head` says why it was dropped
        few = f"re-initialised for {model.config.num_classes} classes (the data name {{}} of them)"
        head = few.format(len(classes or ())) if head.endswith("by name") else result.head
    elif HEAD[0] in target and HEAD[0] not in state:
        held = f"has another one: {other_head[0]} …" if other_head else "has none"
        head = head or f"re-initialised (the file {held})"
    if head:
        notes.append(f"head {head}")
    notes += filter(None, [not_finite(result.state)])  # of what this rank holds
    return ", ".join(notes)


def head_by_name(
    state: State, theirs: list[str] | None, ours: list[str] | None
) -> tuple[State, str]:
    """Order the head's rows as our classes; drop the head if it lacks one of them.

    Args:
        theirs: the file's class names by label.
        ours: the model's.

    Returns:
        the weights, and a text on the head; empty if names are unknown or equal.
    """
    if theirs == ours or HEAD[0] not in state:
        return state, ""
    if theirs is None or ours is None:
        unlike = other_numbers(theirs or ours or [])
        return state, f"taken by number{unlike}" if unlike else ""
    without = {name: tensor for name, tensor in state.items() if name not in HEAD}
    if (len(theirs), len(ours)) == (21841, 1000):
        return state, ""  # the official map of rows has one class more than the names
    rows = list(map(finder(theirs), ours))
    if unknown := [name for name, row in zip(ours, rows, strict=True) if row < 0]:
        way = "; data.match_classes=number takes it as it is" * (len(theirs) == len(ours))
        return without, (
            f"re-initialised for {len(ours):,} classes (the file's {len(theirs):,} lack "
            f"{len(unknown):,} of them, first '{plain(unknown[0])}'{way})"
        )
    if len(set(theirs)) < len(theirs):
        return without, f"re-initialised for {len(ours):,} classes (the file names two alike)"
    head = {name: state[name][rows] for name in HEAD if name in state}
    return without | head, f"of {len(theirs):,} classes, {len(ours):,} taken by name"


def as_it_is(model: nn.Module) -> Callable[[str, str, int, int], Tensor]:
    """Return a reader of the model's current weights, with moments of zero.

    ``Engine.load`` reads masters from it. DeepSpeed itself makes them from weights that it has
    already rounded to bf16.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def read(name: str, kind: str, start: int, stop: int) -> Tensor:
        if kind != "weight":
            return torch.zeros(stop - start)
        return weights[name].flatten()[start:stop]

    return read


def _warn_of_other_routing(model: SwinTransformer, source: Pretrained) -> None:
    """Warn if the model routes differently from our file, which records its routing."""
    theirs = source.config.moe
    if not (source.own and theirs.enabled and model.moe.enabled):
        return
    for key in ("routing", "score", "top_k", "normalize_gate", "gate_after_norm"):
        if getattr(theirs, key) != getattr(model.moe, key):
            log.warning(
                "moe.%s=%s, but the pretrained model has %s",
                key,
                getattr(model.moe, key),
                getattr(theirs, key),
            )


def explain_difference(missing: list[str], extra: list[str]) -> str:
    """Return one line on tensors that the file or the model lacks."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors of the model are not in the file ({missing[0]} …)")
    if extra:
        parts.append(f"{len(extra)} tensors of the file are not in the model ({extra[0]} …)")
    hint = ""
    if any(".experts." in name for name in missing):
        hint = "; a dense model becomes a mixture by `swin-moe convert --upcycle`"
    elif any(".experts." in name for name in extra):
        hint = "; the file's model is a mixture of experts: set moe.blocks and moe.num_experts"
    return " and ".join(parts) + hint
