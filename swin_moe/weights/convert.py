"""The command ``swin-moe convert``: weights from any dialect into any other."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..common.terminal import cell, print_line
from ..common.text import plain
from ..config import Architecture, refuse_dense, validate_architecture
from ..config.variants import default_moe_blocks
from ..models import SwinTransformer
from .adapters import (
    Images,
    Translation,
    from_swin_moe,
    huggingface_config,
    huggingface_processor,
    timm_config,
)
from .described import Described
from .files import PICKLED, State, WeightsError, rank_files, write
from .pretrained import (
    EXPERT_BIAS,
    Pretrained,
    adopt_pretrained_window,
    explain_difference,
    misfit,
    not_finite,
    read_pretrained,
)
from .transfer import Fit, fit, upcycle

# Key of the weights in a .pth of each dialect's programs; without one, it holds only the weights.
_WRAPPER = {"swin_moe": "model", "official": "model", "timm": "state_dict", "mmseg": "state_dict"}
_FOLDERS = ("huggingface", "timm")  # dialects of programs that open a folder
Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Upcycle:
    """``--upcycle experts=8 [top_k=1] [noise=0.0] [gate=zero|random]``."""

    experts: int
    top_k: int = 1
    noise: float = 0.0
    gate: str = "zero"

    @classmethod
    def parse(cls, words: list[str]) -> Upcycle:
        """Read ``key=value`` words.

        Raises:
            ValueError: a word is none of the four.
        """
        kinds = {"experts": int, "top_k": int, "noise": float, "gate": str}
        values: dict[str, Any] = {}
        for word in words:
            key, _, text = word.partition("=")
            try:
                values[key] = kinds[key](text)
            except (KeyError, ValueError):
                raise ValueError(
                    f"--upcycle {word}: expected experts=8, top_k=1, noise=0.01, gate=zero or "
                    "gate=random (other overrides go before --upcycle)"
                ) from None
        if "experts" not in values or values.get("gate", "zero") not in ("zero", "random"):
            raise ValueError("--upcycle needs experts=NUMBER, and gate is zero or random")
        if not 0 <= values.get("noise", 0.0) < math.inf:
            raise ValueError(f"--upcycle noise={values['noise']} must be a number from 0 on")
        return cls(**values)


def convert(
    source_path: Path,
    output: Path,
    console: Console,
    *,
    source_dialect: str = "auto",
    dialect: str = "swin_moe",
    model_name: str = "",
    overrides: Overrides | None = None,
    allow_missing: bool = False,
    upcycling: Upcycle | None = None,
    ranks: int = 1,
    overwrite: bool = False,
    network: str = "",
) -> Architecture:
    """Read, translate, fit to a model, write, and print a table of the tensors.

    Args:
        source_path: see :func:`.files.read`.
        output: ``.safetensors`` or ``.pth``; without a suffix, a folder for Hugging Face and timm,
            and a ``.safetensors`` for all others.
        console: for the table and notes.
        source_dialect: of the source's names; ``auto`` = detect it.
        dialect: of the output's names.
        model_name: the model to fit to; empty = the file's own.
        overrides: keys of ``model`` and ``moe``, e.g. another window or number of classes.
        allow_missing: write although tensors are left over or missing.
        upcycling: make the dense model a mixture of experts.
        ranks: number of files for the experts of an official Swin-MoE ``.pth``.
        overwrite: replace existing files.
        network: its name in a file that holds several.

    Returns:
        the model that was written.

    Raises:
        ValueError: one line for the user.
    """
    output = _named(output, dialect)
    if not overwrite and (found := [p for p in (output, *rank_files(output)) if p.exists()]):
        raise ValueError(f"{plain(found[0])} exists: choose another name, or add --overwrite")
    overrides = _checked(overrides or {})
    source = read_pretrained(source_path, source_dialect, network)
    config, state = _target(source, model_name, overrides), source.state
    if upcycling:
        config, state = _upcycled(config, state, upcycling, overrides.get("moe", {}))
    refuse_dense(config, {**overrides, "model": {"name": model_name}}, {}, "convert")
    target = _initial(config, "meta")
    result = _fitted(source, state, target, config, allow_missing)
    console.print(_table(source.translation, result, target))
    initial = _initial(config, "cpu") if result.missing else {}  # of tensors that the file lacks
    complete = result.state | {name: initial[name] for name in result.missing}
    stated = {"window_size", "img_size"} <= overrides.get("model", {}).keys()
    known = source.window_known or stated or bool(model_name)
    notes = [*source.notes, *filter(None, [not_finite(result.state)])]
    about = _about(source, config, result, dialect, notes)
    _write(output, complete, config, dialect, ranks, known, about, notes)
    for line in (*_closing(output, config, dialect, known), *notes):
        print_line(console, line)
    return config


def _named(output: Path, dialect: str) -> Path:
    """Return the path to write to; raise ``WeightsError`` for a suffix of no known format."""
    if output.suffix not in ("", ".safetensors", *PICKLED):
        folder = " or no suffix for a folder" if dialect in _FOLDERS else ""
        raise WeightsError(
            f"{plain(output)}: the name must end in .safetensors or .pth{folder}; "
            f"{plain(output.suffix)} is not written"
        )
    if output.suffix or dialect in _FOLDERS:
        return output
    return output.with_suffix(".safetensors")


def _fitted(
    source: Pretrained, state: State, target: State, config: Architecture, allow_missing: bool
) -> Fit:
    """Fit the weights to the model; raise ``WeightsError`` that names both if they do not fit."""
    try:
        result = fit(state, target, source.config.model.token_grid, config.model.token_grid)
    except WeightsError as error:
        raise WeightsError(misfit(source, config.model, str(error))) from None
    missing = [
        name
        for name in result.missing
        if not name.startswith("head.") and not name.endswith(EXPERT_BIAS)
    ]
    extra = [*source.translation.unknown, *result.left_over]
    if (missing or extra) and not allow_missing:
        why = misfit(source, config.model, explain_difference(missing, extra))
        raise WeightsError(f"{why} (--allow-missing goes on)")
    return result


def _about(
    source: Pretrained, config: Architecture, result: Fit, dialect: str, notes: list[str]
) -> Described:
    """Return class names and image preparation for the output; add lines to ``notes``."""
    classes, images = source.class_names, source.images
    if classes is not None and (result.head or config.model.num_classes == 0):
        notes.append("the class names are not kept: the head is another one")
        classes = None
    if classes is not None and dialect != "swin_moe" and len(classes) < config.model.num_classes:
        notes.append(
            f"the class names are not kept: {len(classes):,} names, and a head for "
            f"{config.model.num_classes:,} classes"
        )
        classes = None
    if images is not None and len(images.mean) != config.model.in_chans:
        images = None
    return Described(classes=classes, images=images)


def _checked(overrides: Overrides) -> Overrides:
    for section, values in overrides.items():
        if section not in ("model", "moe") or not isinstance(values, dict):
            raise ValueError(
                f"override '{section}': only keys of model and moe count here, e.g. "
                "model.window_size=16"
            )
    return overrides


def _target(source: Pretrained, model_name: str, overrides: Overrides) -> Architecture:
    """Return the config to write: a named model, or the file's own, with overrides."""
    found = source.config
    if model_name:
        classes = {"num_classes": found.model.num_classes} if not found.model.num_classes else {}
        model: dict[str, Any] = {"name": model_name, **classes}
        moe: dict[str, Any] = {}
    else:
        model, moe = found.model.model_dump(), found.moe.model_dump()
    model |= overrides.get("model", {})
    moe |= overrides.get("moe", {})
    config = validate_architecture({"model": model, "moe": moe}, source="convert")
    if not source.window_known and not model_name:
        return config  # the stated window is the file's
    return config.model_copy(update={"model": adopt_pretrained_window(config.model, source)})


def _upcycled(
    config: Architecture, state: State, upcycling: Upcycle, stated: dict[str, Any]
) -> tuple[Architecture, State]:
    moe = config.moe.model_dump() | {
        "blocks": config.moe.blocks or default_moe_blocks(config.model.depths),
        "num_experts": upcycling.experts,
        "top_k": upcycling.top_k,
        # The function stays the same: gates sum to one, and nothing is dropped.
        "normalize_gate": True,
        "eval_capacity_factor": 0.0,
        # Otherwise the norm after the experts would cancel the gate, and the router not learn.
        "gate_after_norm": config.model.family == "swinv2",
        "fc2_bias": config.model.mlp_fc2_bias,
    }
    model = config.model.model_dump()
    config = validate_architecture({"model": model, "moe": moe | stated}, source="--upcycle")
    random_gate, noise = upcycling.gate == "random", upcycling.noise
    state = upcycle(state, config.model, config.moe, noise=noise, random_gate=random_gate)
    return config, state


def _initial(config: Architecture, device: str) -> State:
    """Return a new model's weights; on ``meta``, only their shapes."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dict(SwinTransformer(config.model, config.moe).state_dict())


# --------------------------------------------------------------------------------------------
# Writing


def _write(
    output: Path,
    state: State,
    config: Architecture,
    dialect: str,
    ranks: int,
    window_known: bool,
    about: Described,
    notes: list[str],
) -> None:
    wrapper = _WRAPPER.get(dialect, "")
    if about.classes is not None and output.suffix in PICKLED and not wrapper:
        notes.append(
            f"class names are not in {plain(output)}: {dialect}'s .pth has no place for them"
        )
    if dialect == "swin_moe":
        write(output, state, config if window_known else None, wrapper, about)
        return
    has_window = config.model.family in ("swinv2", "swin_moe") and dialect != "timm"
    if has_window and not window_known:
        raise WeightsError(
            f"the file does not state its window, but {dialect} files do: add --model NAME, or "
            "model.window_size=N and model.img_size=N"
        )
    theirs = from_swin_moe(state, dialect, config.model)
    if dialect in _FOLDERS and not output.suffix:
        _write_folder(output, theirs, config, dialect, about, notes)
    elif dialect == "official" and config.moe.enabled and output.suffix in PICKLED:
        _write_ranks(output, theirs, ranks, about)
    else:
        write(output, theirs, wrapper=wrapper, about=about)
        if dialect in _FOLDERS:
            notes.append(
                f"{plain(output)} is the weights alone: an OUT without a suffix becomes a folder "
                f"that {dialect} opens, with config.json"
            )


def _write_folder(
    output: Path,
    state: State,
    config: Architecture,
    dialect: str,
    about: Described,
    notes: list[str],
) -> None:
    """Write weights, and the files by which the other program opens the folder."""
    model, images = config.model, about.images
    if images is None:
        assumed = (
            "ImageNet's mean and std are assumed" if model.in_chans == 3 else "none is written"
        )
        notes.append(f"the file does not state how its images were prepared: {assumed}")
        images = Images() if model.in_chans == 3 else None
    files: dict[str, dict[str, Any] | None]
    if dialect == "timm":
        files = {"config.json": timm_config(model, images, about.classes)}
    else:
        processor = huggingface_processor(model, images) if images else None
        if images and processor is None:
            notes.append(
                "no preprocessor_config.json: no processor of transformers prepares rectangles"
            )
        files = {
            "config.json": huggingface_config(model, about.classes),
            "preprocessor_config.json": processor,
        }
    write(output / "model.safetensors", state, about=about)
    for name, content in files.items():
        (output / name).unlink(missing_ok=True)
        if content is not None:
            text = json.dumps(content, indent=2)
            (output / name).write_text(text + "\n", encoding="utf-8")


def _write_ranks(output: Path, state: State, ranks: int, about: Described) -> None:
    """Write official Swin-MoE files: ``.master``, and each rank's experts in ``.rank<r>``."""
    experts = {name: tensor for name, tensor in state.items() if ".experts." in name}
    num_experts = len(next(iter(experts.values())))
    if ranks < 1 or num_experts % ranks:
        raise WeightsError(f"--ranks {ranks} does not divide the {num_experts} experts")
    stale = rank_files(output)
    dense = {name: tensor for name, tensor in state.items() if name not in experts}
    counts = {n: t for n, t in dense.items() if n.endswith("_num_global_experts")}
    write(output.with_name(f"{output.name}.master"), dense, wrapper="model", about=about)
    for rank in range(ranks):
        held = {name: tensor.chunk(ranks)[rank] for name, tensor in experts.items()}
        path = output.with_name(f"{output.name}.rank{rank}")
        write(path, held | counts, wrapper="model")
        stale = [old for old in stale if old != path]
    for old in stale:  # of another number of ranks: they would be read too
        if not old.name.endswith(".master"):
            old.unlink()


# --------------------------------------------------------------------------------------------
# Reporting


def _table(translation: Translation, result: Fit, target: State) -> Table:
    """Tabulate the tensors: count those that were only copied, list the others."""
    table = Table(title="tensors", title_justify="left")
    for column in ("what", "number", "which"):
        table.add_column(column, overflow="fold")
    sources = translation.sources
    copied = [name for name in result.state if name not in result.resized]
    matched = [name for name in copied if sources.get(name) == (name,)]
    renamed = [name for name in copied if sources.get(name, (name,)) != (name,)]
    made = [name for name in copied if name not in sources]
    example = f"{' + '.join(sources[renamed[0]])} → {renamed[0]}" if renamed else ""
    table.add_row("matched", str(len(matched)), "")
    table.add_row("renamed", str(len(renamed)), cell(example and f"e.g. {example}"))
    if made:
        table.add_row("upcycled", str(len(made)), cell(f"e.g. {made[0]}"))
    resized = [
        f"{name} {_shape(old)} → {_shape(target[name].shape)}"
        for name, old in result.resized.items()
    ]
    lost = [name for name in result.missing if not name.startswith("head.")]
    again = [*([f"head: {result.head}"] if "re-init" in result.head else []), *lost]
    rows = [f"head: {result.head}"] if result.head and not again else []
    table.add_row("resized", str(len(resized) + len(rows)), _list([*rows, *resized]))
    kinds = sorted({name.rpartition(".")[2] for name in translation.dropped})  # of all blocks
    table.add_row("dropped", str(len(translation.dropped)), _list(kinds))
    left = [*translation.unknown, *result.left_over]
    table.add_row("re-initialised", str(len(again)), _list(again))
    table.add_row("left over", str(len(left)), _list(left))
    return table


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape))


def _list(names: list[str], limit: int = 8) -> Text:
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return Text("\n".join(map(plain, names[:limit] + more)))


def _closing(output: Path, config: Architecture, dialect: str, window_known: bool) -> list[str]:
    lines = [f"wrote {plain(output)} ({dialect})"]
    if any(config.model.pretrained_window_sizes):
        sizes = config.model.pretrained_window_sizes
        lines.append(f"position coordinates are computed for windows trained at {sizes}")
    if dialect == "swin_moe":
        lines.append(f"train from it: swin-moe train CONFIG model.pretrained={plain(output)}")
        if not window_known:
            lines.append(
                "the file does not state its window: --model NAME, or model.window_size=N and "
                "model.img_size=N, records it"
            )
        if config.moe.enabled:
            moe = config.moe
            lines.append(
                f"its config: moe.blocks={moe.blocks} moe.num_experts={moe.num_experts} "
                f"moe.top_k={moe.top_k} moe.normalize_gate={str(moe.normalize_gate).lower()} "
                f"moe.eval_capacity_factor={moe.eval_capacity_factor:g} "
                f"moe.fc2_bias={str(moe.fc2_bias).lower()} "
                f"moe.gate_after_norm={str(moe.gate_after_norm).lower()}"
            )
    return lines
