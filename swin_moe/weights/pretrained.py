"""Start from weights that someone else trained: read, translate, fit, load."""

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
# Buffers of other programs that are computed here, and biases that are not there.
_COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask",
             "_num_global_experts", "batched_fc2_bias")  # fmt: skip


@dataclass
class Pretrained:
    """Weights under our names, and what is known of their model.

    Attributes:
        config: what the file tells of its model, defaults elsewhere.
        window_known: whether the file tells its window.
        own: whether the file is ours and knows its routing, too.
        class_names: of the head's classes, by label; None where the file does not say them.
        images: how they were prepared for the model, where the file says it.
        notes: lines on what else the file holds, and what of it cannot be used.
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
        network: which one to take of a file that holds several, by the prefix of its names.

    Raises:
        ValueError: one line for the user: the file is damaged, of another dialect, or no Swin.
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
    model["pretrained"] = ""  # a run's own beginning is of no interest to who goes on from it
    config = validate_architecture({"model": model, "moe": moe}, source=plain(path))
    _check_positions(translation.state, config.model, path)
    parts = [name for name in translation.dropped if not name.endswith(_COMPUTED)]
    about.notes += not_read(parts, path)
    if about.config is None and "img_size" in model:  # it states where it was trained
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
    why = "; only a file that tells its image size can have a rectangle's"
    if positions == grid + 1 and model.family == "swinv2":
        why = ": one is for a class token, as transformers' Swinv2 has it, which cannot run so"
    height, width = model.image_sides
    raise WeightsError(
        f"{plain(path)}: absolute_pos_embed has {positions} positions, images of {height} x "
        f"{width} pixels have {grid}{why}"
    )


def not_finite(state: State) -> str:
    """A line on weights that are NaN or infinite, else empty."""
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
    """The file's names where they are as many as the head's classes.

    A run's own may be fewer: ``model.num_classes`` may leave room.
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
    """Take from ``config.json`` what tensors do not show.

    Raises:
        WeightsError: it asks for what the family does not have.
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
    """V2 at another window than the file's is asked for the coordinates that it was trained with.

    Where the config leaves ``pretrained_window_sizes`` empty, they become the file's windows, or
    those of the config's variant if the file does not state its own (timm's files do not).
    """
    theirs = source.config.model
    if model.family not in ("swinv2", "swin_moe") or model.pretrained_window_sizes:
        return model
    if len(theirs.depths) != len(model.depths):
        return model  # the weights will not fit, and that is told
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
    """Window of each stage, clipped to the grid."""
    stages = range(len(model.depths))
    grids = [min(-(-side // 2**stage) for side in model.token_grid) for stage in stages]
    return [min(grid, model.window_size) for grid in grids]


@torch.no_grad()
def load_pretrained(
    model: SwinTransformer, source: Pretrained, classes: list[str] | None = None
) -> str:
    """Copy weights into a model; of the experts what this rank holds.

    Args:
        classes: names of the model's classes: where the file names its own, the head's rows go by
            name, and a head that lacks one of them is left as the model initialised it.

    The bias on the choice of experts is taken along where both have one, see
    ``moe.expert_bias_update_rate``.

    Returns:
        what happened, in one line.

    Raises:
        WeightsError: the file has too much or too little, other than a head.
    """
    try:
        return "; ".join([_load(model, source, classes), *source.notes])
    except WeightsError as error:
        raise WeightsError(misfit(source, model.config, str(error))) from None


def misfit(source: Pretrained, model: ModelConfig, why: str) -> str:
    """One line on weights that do not fit a model: which file, which model, and how they differ."""
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
    if HEAD[0] in state and result.head:  # else its reason is why it was dropped
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

    Returns:
        the weights, and what became of the head; empty if names are unknown or the same.
    """
    if theirs == ours or HEAD[0] not in state:
        return state, ""
    if theirs is None or ours is None:
        unlike = other_numbers(theirs or ours or [])
        return state, f"taken by number{unlike}" if unlike else ""
    without = {name: tensor for name, tensor in state.items() if name not in HEAD}
    if (len(theirs), len(ours)) == (21841, 1000):
        return state, ""  # their official map of rows knows one class more than the names
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
    """A reader of the model's weights as they are now, and of moments that are zero.

    ``Engine.load`` reads masters from it. DeepSpeed makes them from weights that it has rounded to
    bf16 before.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def read(name: str, kind: str, start: int, stop: int) -> Tensor:
        if kind != "weight":
            return torch.zeros(stop - start)
        return weights[name].flatten()[start:stop]

    return read


def _warn_of_other_routing(model: SwinTransformer, source: Pretrained) -> None:
    """Our files know how their mixtures route; another way computes something else."""
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
    """One line on tensors that the file lacks or the model does not know."""
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
