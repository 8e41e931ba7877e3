"""Start from weights that someone else trained: read, translate, fit, load."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import persistent_buffers
from ..config import Architecture, ModelConfig, validate_architecture
from ..moe.experts import ExpertLinear
from .dialects import Translation, detect, to_swin_moe
from .swin import SwinTransformer
from .transfer import fit, infer_model
from .weights import State, WeightsError, read

log = logging.getLogger("swin_moe")

CHOICE_BIAS = "choice_bias.rises"


@dataclass
class Pretrained:
    """Weights under our names, and what is known of their model.

    Attributes:
        config: what the file tells of its model, defaults elsewhere.
        window_known: whether the file tells its window.
        own: whether the file is ours and knows its routing, too.
    """

    translation: Translation
    dialect: str
    config: Architecture
    window_known: bool
    own: bool

    @property
    def state(self) -> State:
        return self.translation.state


def read_pretrained(path: Path, dialect: str = "auto") -> Pretrained:
    """Read weights of any dialect.

    Raises:
        ValueError: one line for the user: the file is damaged, of another dialect, or no Swin.
    """
    weights = read(path)
    if dialect == "auto":
        dialect = "swin_moe" if weights.config else detect(weights.state)
    translation = to_swin_moe(weights.state, dialect)
    if weights.config is not None:
        raw = weights.config.model_dump()
        model, moe = raw["model"], raw["moe"]
    else:
        model, moe = infer_model(translation.state, translation.dropped)
        model |= _huggingface_model(weights.foreign, path)
    model["pretrained"] = ""  # a run's own beginning is of no interest to who goes on from it
    config = validate_architecture({"model": model, "moe": moe}, source=str(path))
    own = weights.config is not None
    return Pretrained(translation, dialect, config, "window_size" in model, own)


def _huggingface_model(stated: dict[str, object], path: Path) -> dict[str, object]:
    """What tensors do not tell and a ``config.json`` does.

    Raises:
        WeightsError: it asks for what the family does not have.
    """
    for key, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-5)):
        if stated.get(key, value) != value:
            raise WeightsError(
                f"{path}: its config.json has {key}={stated[key]!r}, ours is {value}"
            )
    keys = {"img_size": "image_size", "window_size": "window_size"}
    model = {ours: stated[theirs] for ours, theirs in keys.items() if theirs in stated}
    sizes = stated.get("pretrained_window_sizes")
    if isinstance(sizes, list) and any(sizes):
        model["pretrained_window_sizes"] = sizes
    return model


def adopt_pretrained_window(model: ModelConfig, source: Pretrained) -> ModelConfig:
    """V2 at another window than the file's is asked for the coordinates that it was trained with.

    Where the config leaves ``pretrained_window_sizes`` empty, they become the file's windows.
    """
    theirs = source.config.model
    if model.family not in ("swinv2", "swin_moe") or model.pretrained_window_sizes:
        return model
    if len(theirs.depths) != len(model.depths):
        return model  # the weights will not fit, and that is told
    if not source.window_known:
        log.warning(
            "the pretrained file does not tell its window; model.pretrained_window_sizes is "
            "needed if it was not %d",
            model.window_size,
        )
        return model
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
def load_pretrained(model: SwinTransformer, source: Pretrained) -> str:
    """Copy weights into a model; of the experts what this rank holds.

    The bias on the choice of experts is taken along where both have one, see
    ``moe.bias_update_rate``.

    Returns:
        what happened, in one line.

    Raises:
        WeightsError: the file has too much or too little, other than a head.
    """
    buffers = persistent_buffers(model)
    target = {**dict(model.named_parameters()), **buffers}
    state = {n: t for n, t in source.state.items() if n in target or not n.endswith(CHOICE_BIAS)}
    _warn_of_other_routing(model, source)
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
    missing = [n for n in result.missing if not n.startswith("head.") and n not in buffers]
    extra = [*source.translation.unknown, *result.left_over]
    extra = [name for name in extra if not name.startswith("head.")]
    if missing or extra:
        raise WeightsError(explain_difference(missing, extra))
    for name, tensor in result.state.items():
        target[name].copy_(tensor)
    notes = [f"{len(result.state)} tensors of {source.dialect} names"]
    if result.resized:
        notes.append(f"{len(result.resized)} resized")
    if result.head:
        notes.append(f"head {result.head}")
    return ", ".join(notes)


def as_it_is(model: SwinTransformer) -> Callable[[str, str, int, int], Tensor]:
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
    if not source.own or not theirs.enabled:
        return
    for key in ("top_k", "normalize_gate"):
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
    experts = any(".experts." in name for name in missing)
    hint = "; a dense model becomes a mixture by `swin-moe convert --upcycle`" if experts else ""
    return " and ".join(parts) + hint
