"""Read and write files of weights, whatever wrote them; nothing in a file is ever executed."""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import checkpoint
from ..config import Architecture, ConfigError, load_config, validate_architecture
from ..reading import openable
from . import deepspeed_files
from .pickled import State, WeightsError, read_pickled

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# What wrappers of modules put before every name: DDP, torch.compile, Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_RANK_FILE = re.compile(r"\.(rank\d+|master|global)$")
_METADATA_KEY = "swin_moe"
_INDEX = "model.safetensors.index.json"


@dataclass
class Weights:
    """Tensors as a file names them.

    Attributes:
        config: the model that the file says it is, as ours do.
        foreign: content of a ``config.json`` beside the weights (Hugging Face).
    """

    state: State
    config: Architecture | None = None
    foreign: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Weights:
    """Read a ``.pth``, a ``.safetensors``, a folder of shards, our checkpoint or run directory,
    DeepSpeed's, or an official Swin-MoE checkpoint (``X.pth`` for ``X.pth.master`` and
    ``X.pth.rank*``).

    Raises:
        WeightsError: the file is missing, damaged, or holds something other than weights.
    """
    weights = _read(path)
    weights.state = _plain(weights.state, path)
    return weights


def _plain(state: State, path: Path) -> State:
    """Names without the prefixes of wrappers; refuses what is not a plain tensor on the CPU."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not name.isprintable():
            raise WeightsError(f"{path}: {name!r:.80} is no name of a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise WeightsError(f"{path}: '{name}' is sparse, quantised or without content")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read(path: Path) -> Weights:
    if path.is_dir():
        return _read_folder(path)
    if not path.exists() or _RANK_FILE.search(path.name):
        stem = path.with_name(_RANK_FILE.sub("", path.name))
        if not rank_files(stem):
            raise WeightsError(f"{path}: no such file or folder")
        return Weights(_read_ranks(stem))
    foreign = {}
    if path.stem in ("model", "pytorch_model"):  # of a Hugging Face folder
        foreign = _foreign_config(path.parent)
    if path.suffix == ".safetensors":
        weights = _read_safetensors(path)
        weights.foreign = foreign
        return weights
    if path.suffix in PICKLED:
        return Weights(read_pickled(path), foreign=foreign)
    raise WeightsError(f"{path}: expected .safetensors, {', '.join(PICKLED)} or a folder")


def write(path: Path, state: State, config: Architecture | None = None, wrapper: str = "") -> None:
    """Write ``.safetensors``, or for tools that read nothing else a ``.pth``.

    Args:
        config: kept in the metadata of a safetensors file, so that it knows its model.
        wrapper: key of the ``.pth`` under which the weights stand; empty = they are all of it.

    Raises:
        WeightsError: the name ends in neither.
    """
    # Of one storage each: views and tied tensors would drag their whole storage along.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    pickled = path.suffix in PICKLED or bool(_RANK_FILE.search(path.name))
    if path.suffix != ".safetensors" and not pickled:
        raise WeightsError(f"{path}: the name must end in .safetensors or .pth")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder")
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if pickled:
            torch.save({wrapper: tensors} if wrapper else tensors, partial)
        else:
            save_file(tensors, partial, metadata=_metadata(config))
            partial.chmod(0o644)  # safetensors keeps its files to their owner
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise WeightsError(f"{path}: cannot be written ({first:.100})") from None
    finally:
        partial.unlink(missing_ok=True)


def _metadata(config: Architecture | None) -> dict[str, str]:
    if config is None:
        return {"format": "pt"}
    sections = {"model": config.model.model_dump(), "moe": config.moe.model_dump()}
    return {"format": "pt", _METADATA_KEY: json.dumps(sections)}


# --------------------------------------------------------------------------------------------
# safetensors and folders


def _read_safetensors(path: Path) -> Weights:
    try:
        with openable(path) as file, safe_open(file, framework="pt", device="cpu") as handle:
            metadata = handle.metadata() or {}
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: truncated or not a safetensors file ({error})") from None
    return Weights(state, _own_config(metadata.get(_METADATA_KEY), path))


def _own_config(text: str | None, path: Path) -> Architecture | None:
    if text is None:
        return None
    try:
        return validate_architecture(json.loads(text), source=str(path))
    except (ConfigError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: its metadata cannot be read ({error})") from None


def _read_folder(path: Path) -> Weights:
    if (path / "checkpoints").is_dir():  # a run directory
        newest = checkpoint.latest(path / "checkpoints")
        if newest is None:
            raise WeightsError(f"{path}: the run has no checkpoint yet")
        path = newest
    if (path / "manifest.json").exists():
        checkpoint.verify(path)
        reader = checkpoint.Reader(path)
        config = load_config(path / "config.yaml")
        return Weights({name: reader.tensor(name) for name in reader.names()}, config)
    if deepspeed_files.found(path):
        return Weights(deepspeed_files.read(path))
    shards = _shards(path)
    if len(shards) > 1 and not (path / _INDEX).exists() and not _complete(shards):
        raise WeightsError(
            f"{path}: {len(shards)} safetensors files, no complete set: name the one to read"
        )
    elif not shards and (path / "pytorch_model.bin").is_file():
        return Weights(read_pickled(path / "pytorch_model.bin"), foreign=_foreign_config(path))
    if not shards:
        raise WeightsError(f"{path}: no *.safetensors and no checkpoint in this folder")
    parts = [_read_safetensors(shard) for shard in shards]
    merged = {name: tensor for part in parts for name, tensor in part.state.items()}
    return Weights(merged, parts[0].config, _foreign_config(path))


def _shards(folder: Path) -> list[Path]:
    """The files that the index names, without an index all; others are not looked at."""
    index = folder / _INDEX
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index}: not an index of shards") from None
    shards = [folder / str(name) for name in sorted(map(str, names))]
    for shard in shards:
        if shard.parent != folder or not shard.is_file():
            raise WeightsError(f"{folder}: the shard {shard.name} is missing")
    return shards


def _complete(shards: list[Path]) -> bool:
    """Whether names end in -00001-of-00003 and so on, and none is missing."""
    found = [re.search(r"^(.*)-(\d+)-of-(\d+)$", shard.stem) for shard in shards]
    sets = {(match[1], match[3]) for match in found if match}
    return all(found) and len(sets) == 1 and int(sets.pop()[1]) == len(shards)


def _foreign_config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# --------------------------------------------------------------------------------------------
# Official Swin-MoE


def _read_ranks(stem: Path) -> State:
    """Official Swin-MoE: dense weights in ``.master``, each rank's experts in ``.rank<r>``."""
    whole = stem.with_name(f"{stem.name}.global")
    if whole.exists():
        return read_pickled(whole)
    found = {int(p.suffix[5:]): p for p in stem.parent.glob(f"{stem.name}.rank*")}
    if sorted(found) != list(range(len(found))) or not found:
        missing = next(r for r in range(len(found) + 1) if r not in found)
        raise WeightsError(f"{stem}.rank{missing} is missing: the experts it holds would be lost")
    ranks = [read_pickled(found[rank]) for rank in range(len(found))]
    state = dict(ranks[0])
    master = stem.with_name(f"{stem.name}.master")
    if master.exists():
        state |= read_pickled(master)
    for name in [name for name in state if ".experts." in name]:
        parts = [rank[name] for rank in ranks if name in rank]
        experts = state.get(name.split(".experts.")[0] + "._num_global_experts")
        if len(parts) != len(ranks) or experts is None:
            raise WeightsError(f"{stem}.rank*: '{name}' is not in every rank's file")
        state[name] = _join_experts(parts, int(experts), f"{stem}: {name}")
    for name in [name for name in state if name.endswith("batched_fc2_bias")]:
        # Shards of a bias are rounded up.
        width = state[name.replace("batched_fc2_bias", "batched_fc2_w")].shape[2]
        state[name] = state[name][:, :width]
    return state


def rank_files(stem: Path) -> list[Path]:
    """The files of an official Swin-MoE checkpoint ``X.pth`` that are there."""
    found = stem.parent.glob(f"{glob.escape(stem.name)}.*") if stem.parent.is_dir() else ()
    return sorted(path for path in found if _RANK_FILE.sub("", path.name) == stem.name)


def _join_experts(parts: list[Tensor], num_experts: int, what: str) -> Tensor:
    """Ranks' [E_local, ...] to [E, ...]; k consecutive ranks may hold slices of one expert."""
    held = sum(part.shape[0] for part in parts)
    slices, rest = divmod(held, num_experts)
    if rest or slices == 0 or (slices > 1 and parts[0].shape[0] != 1):
        raise WeightsError(f"{what}: {len(parts)} ranks hold {held} of {num_experts} experts")
    experts = [torch.cat(parts[i : i + slices], 1) for i in range(0, len(parts), slices)]
    return torch.cat(experts if slices > 1 else parts)
