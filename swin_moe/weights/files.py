"""Reading and writing files of weights of any program, without executing anything in them."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import checkpoint
from ..common.reading import openable, read_json
from ..common.text import plain
from ..common.writing import replacing
from ..config import Architecture, load_config
from .adapters import State
from .deepspeed import is_deepspeed_folder, read_deepspeed_folder
from .described import Described, from_folder, from_metadata, images_of, metadata
from .file_kind import WeightsError, kind_of, unreadable
from .safe_pickle import load_pickled, tensors_of
from .wrappers import take_network

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_RANK_FILE = re.compile(r"\.(rank\d+|master|global)$")
_ADDRESS = re.compile(r"\w{2,}:/|hf-hub:")
_EXPANDED = 1 << 30  # bytes of tensors that are larger than their storage in the file
# Hugging Face's lists of shards.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass
class Weights:
    """Tensors by a file's names, and its description of the model."""

    state: State
    about: Described = field(default_factory=Described)


def read(path: Path, network: str = "") -> Weights:
    """Read weights from a file or a folder.

    Args:
        path: a ``.pth``, a ``.safetensors``, a folder of shards, our checkpoint or run directory,
            DeepSpeed's folder, or an official Swin-MoE checkpoint (``X.pth`` for ``X.pth.master``
            and ``X.pth.rank*``).
        network: its name in a file that holds several, see :func:`take_network`.

    Raises:
        WeightsError: the file is missing, damaged, or holds something other than weights.
    """
    try:
        weights = _read(path)
    except OSError as error:
        raise WeightsError(unreadable(path, error)) from None
    weights.state, notes = take_network(weights.state, path, network)
    _check_plain(weights.state, path)
    weights.about.notes += notes
    return weights


def _check_plain(state: State, path: Path) -> None:
    """Raise ``WeightsError`` for any other than plain tensors on the CPU."""
    expanded = 0
    for name, tensor in state.items():
        if not name.isprintable():
            raise WeightsError(f"{plain(path)}: {name!r:.80} is no name of a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise WeightsError(f"{plain(path)}: '{name}' is sparse, quantised or without content")
        if not tensor.numel():
            raise WeightsError(
                f"{plain(path)}: '{name}' is empty, as in one of many parts (ZeRO-3, FSDP): name "
                "the checkpoint's folder"
            )
        size = tensor.numel() * tensor.element_size()
        if size > (held := tensor.untyped_storage().nbytes()):  # made by `expand`
            expanded += size
            if expanded > _EXPANDED:
                raise WeightsError(
                    f"{plain(path)}: '{name}' has {size:,} bytes, the file holds {held:,} of them; "
                    "save it again with tensor.contiguous()"
                )


def _read(path: Path) -> Weights:
    if path.is_dir():
        return _read_folder(path)
    if not path.exists() or _RANK_FILE.search(path.name):
        stem = path.with_name(_RANK_FILE.sub("", path.name))
        if not rank_files(stem):
            download = ": download the file" if _ADDRESS.match(str(path)) else ""
            raise WeightsError(f"{plain(path)}: no such file or folder{download}")
        try:
            return _read_ranks(stem)
        except (RuntimeError, LookupError, ArithmeticError, TypeError) as error:
            raise WeightsError(
                f"{plain(stem)}.rank*: the experts cannot be put together ({error})"
            ) from None
    # A config.json in the folder describes only files of these names.
    about = from_folder(path.parent) if path.stem in ("model", "pytorch_model") else None
    return _read_file(path, about)


def _read_file(path: Path, about: Described | None = None) -> Weights:
    """Read one file, by its content and not by its suffix.

    Args:
        about: from other files in its folder; the file's own description takes precedence.
    """
    if kind_of(path) == "safetensors":
        state, texts = _read_safetensors(path)
    else:
        content = load_pickled(path)
        state, texts = tensors_of(content, path), content if isinstance(content, dict) else {}
    own = from_metadata(texts, path)
    if about is not None:
        own.classes, own.images = own.classes or about.classes, own.images or about.images
        own.foreign, own.notes = about.foreign, own.notes + about.notes
    return Weights(state, own)


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with openable(path) as file, safe_open(file, framework="pt", device="cpu") as handle:
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return state, handle.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(
            f"{plain(path)}: truncated or not a safetensors file ({error})"
        ) from None
    except (OSError, RuntimeError) as error:
        raise WeightsError(unreadable(path, error)) from None


def write(
    path: Path,
    state: State,
    config: Architecture | None = None,
    wrapper: str = "",
    about: Described | None = None,
) -> None:
    """Write a ``.safetensors`` or, for tools that read nothing else, a ``.pth``.

    Args:
        config: of the model, stored in the file unless it is a bare ``.pth``.
        wrapper: key of the weights in the ``.pth``; empty = the file holds only the weights.
        about: with class names and preparation of images, stored in the same way.

    Raises:
        WeightsError: the name ends in neither.
    """
    # Each with its own storage: views and tied tensors would be saved with their whole storage.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    pickled = path.suffix in PICKLED or bool(_RANK_FILE.search(path.name))
    if path.suffix != ".safetensors" and not pickled:
        raise WeightsError(f"{plain(path)}: the name must end in .safetensors or .pth")
    if path.is_dir():
        raise WeightsError(f"{plain(path)} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = metadata(config, about or Described())
    try:
        with replacing(path) as partial:
            if pickled:
                torch.save({wrapper: tensors, **texts} if wrapper else tensors, partial)
            else:
                partial.touch()  # with the umask's mode, which safetensors ignores
                mode = partial.stat().st_mode
                save_file(tensors, partial, metadata={"format": "pt", **texts})
                partial.chmod(mode)
    except (OSError, RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise WeightsError(f"{plain(path)}: cannot be written ({first:.100})") from None


# --------------------------------------------------------------------------------------------
# Folders


def _read_folder(path: Path) -> Weights:
    if (path / "checkpoints").is_dir():  # a run directory
        newest = checkpoint.latest(path / "checkpoints")
        if newest is None:
            raise WeightsError(f"{plain(path)}: the run has no checkpoint yet")
        path = newest
    if (path / "manifest.json").exists():
        checkpoint.verify(path)
        reader = checkpoint.Reader(path)
        config = load_config(path / "config.yaml")
        about = Described(config, reader.class_names, images_of(config))
        return Weights({name: reader.tensor(name) for name in reader.names()}, about)
    if is_deepspeed_folder(path):
        return Weights(read_deepspeed_folder(path))
    first, *more = _files(path)
    weights = _read_file(first, from_folder(path))
    for file in more:
        state = _read_file(file).state
        if both := weights.state.keys() & state.keys():
            raise WeightsError(f"{plain(file)}: '{min(both)}' is in another shard, too")
        weights.state |= state
    return weights


def _files(folder: Path) -> list[Path]:
    """Return the files that an index names, or the only file, or a complete set."""
    for index in (folder / name for name in _INDEXES):
        if index.exists():
            return _indexed(index)
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    shards = [path for path in files if path.suffix == ".safetensors"]
    shards = shards or [path for path in files if re.match(r"pytorch_model.*\.bin$", path.name)]
    if folder / "model.safetensors" in shards:  # the name that every program reads
        return [folder / "model.safetensors"]
    if len(shards) > 1 and not _complete(shards):
        raise WeightsError(
            f"{plain(folder)}: {len(shards)} {shards[0].suffix} files, no complete set: name the "
            "one to read"
        )
    if not shards:
        hint = _hint(folder)
        raise WeightsError(
            f"{plain(folder)}: no *.safetensors and no checkpoint in this folder{hint}"
        )
    return shards


def _hint(folder: Path) -> str:
    """Describe another program's folder, or name a file in it that can be read."""
    if (folder / ".metadata").exists():
        return (
            "; torch.distributed.checkpoint wrote it: convert it by `python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth`"
        )
    if (folder / "saved_model.pb").exists():
        return "; it is a TensorFlow SavedModel, which is not read"
    found = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    return f"; name the file: {plain(folder / found[0])}" if found else ""


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{plain(index)}: not an index of shards") from None
    shards = [index.parent / str(name) for name in sorted(map(str, names))]
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise WeightsError(f"{plain(index.parent)}: the shard {plain(shard.name)} is missing")
    return shards


def _complete(shards: list[Path]) -> bool:
    """Return whether the names end in -00001-of-00003 and so on, and none is missing."""
    found = [re.search(r"^(.*)-(\d+)-of-(\d+)$", shard.stem) for shard in shards]
    sets = {(match[1], match[3]) for match in found if match}
    return all(found) and len(sets) == 1 and int(sets.pop()[1]) == len(shards)


# --------------------------------------------------------------------------------------------
# Official Swin-MoE


def _read_ranks(stem: Path) -> Weights:
    """Read official Swin-MoE files: dense weights of ``.master``, experts of each ``.rank<r>``."""
    whole = stem.with_name(f"{stem.name}.global")
    if whole.exists():
        return _read_file(whole)
    found = {int(p.suffix[5:]): p for p in rank_files(stem) if p.suffix.startswith(".rank")}
    if sorted(found) != list(range(len(found))) or not found:
        missing = next(r for r in range(len(found) + 1) if r not in found)
        raise WeightsError(
            f"{plain(stem)}.rank{missing} is missing: the experts it holds would be lost"
        )
    ranks = [tensors_of(load_pickled(path), path) for _, path in sorted(found.items())]
    weights = Weights(dict(ranks[0]))
    state = weights.state
    master = stem.with_name(f"{stem.name}.master")
    if master.exists():
        dense = _read_file(master)
        state |= dense.state
        weights.about = dense.about
    for name in [name for name in state if ".experts." in name]:
        parts = [rank[name] for rank in ranks if name in rank]
        experts = state.get(name.split(".experts.")[0] + "._num_global_experts")
        if len(parts) != len(ranks) or experts is None:
            raise WeightsError(f"{plain(stem)}.rank*: '{name}' is not in every rank's file")
        state[name] = _join_experts(parts, int(experts), f"{plain(stem)}: {name}")
    for name in [name for name in state if name.endswith("batched_fc2_bias")]:
        # Ranks' parts of a bias are rounded up.
        width = state[name.replace("batched_fc2_bias", "batched_fc2_w")].shape[2]
        state[name] = state[name][:, :width]
    return weights


def rank_files(stem: Path) -> list[Path]:
    """Return the existing files of an official Swin-MoE checkpoint ``X.pth``."""
    found = stem.parent.glob(f"{glob.escape(stem.name)}.*") if stem.parent.is_dir() else ()
    return sorted(path for path in found if _RANK_FILE.sub("", path.name) == stem.name)


def _join_experts(parts: list[Tensor], num_experts: int, what: str) -> Tensor:
    """Join ranks' [E_local, ...] to [E, ...]; k consecutive ranks may hold slices of an expert."""
    held = sum(part.shape[0] for part in parts)
    slices, rest = divmod(held, num_experts)
    if rest or slices == 0 or (slices > 1 and parts[0].shape[0] != 1):
        raise WeightsError(f"{what}: {len(parts)} ranks hold {held} of {num_experts} experts")
    experts = [torch.cat(parts[i : i + slices], 1) for i in range(0, len(parts), slices)]
    return torch.cat(experts if slices > 1 else parts)
