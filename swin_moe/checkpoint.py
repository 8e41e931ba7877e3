"""Checkpoints by logical name: weights, optimizer, position and generators; no pickle.

One folder per checkpoint, ``step-00000042``::

    dense.safetensors               fp32 master weights, persistent buffers as they are
    dense.optimizer.safetensors     their moments, as <name>.exp_avg and <name>.exp_avg_sq
    experts-<first>.safetensors     experts [first, first + n) of every layer, stacked
    experts-<first>.optimizer.safetensors
    experts-<first>-shard-<i>.…     part i of experts whose hidden width several ranks share
    rng-<rank>.safetensors          generator state of each rank
    state.json, config.yaml         position, metrics; the resolved config
    manifest.json                   size and SHA-256 of each file

The folder is written beside under another name, the manifest last, and then renamed: a folder with
the right name and a manifest that fits is complete. Expert tensors carry global indices and which
part of the experts they are, so any expert-parallel size reads what another wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .distributed import World, barrier, rng_state, set_rng_state
from .placement import ExpertShare, shard_axis

log = logging.getLogger("swin_moe")

FORMAT = 1
_NAME = re.compile(r"^step-(\d{8,})$")
StateIterator = Iterator[tuple[str, dict[str, Tensor]]]


REQUIRED = {"dense.safetensors", "dense.optimizer.safetensors", "state.json", "config.yaml"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line for the user."""


class FormatError(CheckpointError):
    """A checkpoint that another version of the program wrote: not damaged."""


# --------------------------------------------------------------------------------------------
# Writing


def save(
    folder: Path,
    step: int,
    *,
    export: Callable[[Callable[[str], bool]], StateIterator],
    expert_names: set[str],
    share: ExpertShare,
    state: dict[str, Any],
    config_text: str,
    world: World,
) -> Path:
    """Write ``folder/step-<step>`` atomically; called by every rank.

    Rank 0 writes the dense part, the first replica of each expert group its experts, every rank its
    generator state. ``export`` is :meth:`Engine.export_state`; ``share`` says which experts of a
    layer this rank has.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"partial-{final.name}"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    writes_experts = bool(expert_names) and world.expert_data.rank == 0

    def keep(name: str) -> bool:
        return writes_experts if name in expert_names else world.is_main

    kept = dict(export(keep))
    dense = {n: t for n, t in kept.items() if n not in expert_names}
    experts = {n: t for n, t in kept.items() if n in expert_names}
    written = [_write(partial / f"rng-{world.rank}.safetensors", rng_state())]
    if world.is_main:
        written += _write_state(partial / "dense", dense, {})
        (partial / "config.yaml").write_text(config_text, encoding="utf-8")
        text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1)
        (partial / "state.json").write_text(text, encoding="utf-8")
        written += [partial / "config.yaml", partial / "state.json"]
    if writes_experts:
        written += _write_experts(partial, experts, share)
    digests = _gather({path.name: _digest(path) for path in written}, world)
    if world.is_main:
        manifest = partial / "manifest.json"
        manifest.write_text(json.dumps({"format": FORMAT, "files": digests}, indent=1))
        for path in (manifest, partial):
            _sync(path)
        if final.exists():  # an older run's or a damaged one that the resume passed over
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)
    barrier()
    return final


def _write_experts(
    folder: Path, experts: dict[str, dict[str, Tensor]], share: ExpertShare
) -> list[Path]:
    first = share.experts.start
    name, metadata = f"experts-{first}", {"first_expert": str(first)}
    if share.shards > 1:
        name += f"-shard-{share.shard}"
        metadata |= {"shard": str(share.shard), "shards": str(share.shards)}
    return _write_state(folder / name, experts, metadata)


def _write_state(
    stem: Path, tensors: dict[str, dict[str, Tensor]], metadata: dict[str, str]
) -> list[Path]:
    weights = {name: kinds["weight"] for name, kinds in tensors.items()}
    moments = {
        f"{name}.{kind}": tensor
        for name, kinds in tensors.items()
        for kind, tensor in kinds.items()
        if kind != "weight"
    }
    files = [_write(stem.with_suffix(".safetensors"), weights, metadata)]
    if moments:
        files.append(_write(stem.with_suffix(".optimizer.safetensors"), moments, metadata))
    return files


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata=metadata or {})
    _sync(path)
    return path


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that the rename never points at lost data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return {"bytes": path.stat().st_size, "sha256": sha.hexdigest()}


def _gather(mine: dict[str, Any], world: World) -> dict[str, Any]:
    if world.size == 1:
        return mine
    parts: list[dict[str, Any]] = [{} for _ in range(world.size)]
    dist.all_gather_object(parts, mine)
    return {name: entry for part in parts for name, entry in sorted(part.items())}


def prune(folder: Path, keep_last: int, best: Path | None) -> None:
    """Remove all but the newest ``keep_last`` and the best; point ``last`` and ``best`` at them."""
    found = list_checkpoints(folder)
    for path in found[keep_last:]:
        if best is None or path.name != best.name:
            shutil.rmtree(path)
    for path in folder.glob("partial-*"):
        shutil.rmtree(path)
    for name, target in (("last", found[0] if found else None), ("best", best)):
        if target is not None and target.exists():
            temporary = folder / f".{name}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target.name)
            temporary.replace(folder / name)


# --------------------------------------------------------------------------------------------
# Reading


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first; complete or not is for :func:`verify` to say."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def verify(path: Path) -> None:
    """Check sizes and digests against the manifest.

    Raises:
        CheckpointError: what is missing, cut off or changed.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = {str(n): (int(e["bytes"]), str(e["sha256"])) for n, e in manifest["files"].items()}
        version = int(manifest["format"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no manifest.json (the write did not finish)") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: manifest.json is damaged") from None
    if version != FORMAT:
        raise FormatError(f"{path}: written in format {version}, this version reads {FORMAT}")
    if not set(files) >= REQUIRED:
        raise CheckpointError(f"{path}: manifest.json names no {min(REQUIRED - set(files))}")
    for name, (size, digest) in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{path}: {name} has {file.stat().st_size} of {size} bytes")
        if _digest(file)["sha256"] != digest:
            raise CheckpointError(f"{path}: the content of {name} has changed (SHA-256)")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, None if there is none at all; damaged ones are reported.

    Raises:
        CheckpointError: there are checkpoints, but every one of them is damaged, or the newest
            whole one is of another format.
    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            verify(path)
        except FormatError:
            raise
        except CheckpointError as error:
            log.warning("damaged checkpoint passed over: %s", error)
            continue
        return path
    if found:
        raise CheckpointError(
            f"{folder}: all {len(found)} checkpoints are damaged (--fresh starts anew)"
        )
    return None


def set_aside_newer(folder: Path, chosen: Path) -> None:
    """Rename the damaged checkpoints after ``chosen``, so that they count no longer."""
    for path in list_checkpoints(folder):
        if path.name == chosen.name:
            return
        aside = folder / f"damaged-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


@dataclass(frozen=True)
class _Place:
    """A file, and where its stacked expert tensors lie among all experts; None: it has none."""

    file: Path
    first_expert: int | None
    shard: int
    shards: int


class Reader:
    """Tensors of one checkpoint by logical name.

    Args:
        path: a checkpoint folder that :func:`verify` accepts.

    Attributes:
        state: content of ``state.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self._places: dict[str, list[_Place]] = {}
        self._handles: dict[Path, Any] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            if not file.name.startswith("rng-"):
                self._index(file)

    def _index(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="pt", device="cpu").__enter__()
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a safetensors file ({error})") from None
        self._handles[file] = handle
        metadata = handle.metadata() or {}
        first = metadata.get("first_expert")
        shard, shards = int(metadata.get("shard", 0)), int(metadata.get("shards", 1))
        place = _Place(file, None if first is None else int(first), shard, shards)
        for key in handle.keys():  # noqa: SIM118 - a handle, not a dict
            self._places.setdefault(key, []).append(place)

    def names(self) -> list[str]:
        """Names of the weights, those of persistent buffers included."""
        return sorted(
            key for key, places in self._places.items() if ".optimizer." not in places[0].file.name
        )

    def tensor(self, name: str, kind: str = "weight", share: ExpertShare | None = None) -> Tensor:
        """One tensor; of a stacked expert tensor a share, whatever shares the files hold.

        Raises:
            CheckpointError: the checkpoint has no such tensor or not all of the share.
        """
        key = name if kind == "weight" else f"{name}.{kind}"
        places = self._places.get(key)
        if not places:
            raise CheckpointError(f"{self.path}: has no tensor '{key}': another model wrote it")
        if share is None or places[0].first_expert is None:
            whole = self._handles[places[0].file].get_tensor(key)
            return whole if share is None else share.of(name, whole)
        return self._assemble(name, key, places, share)

    def _assemble(self, name: str, key: str, places: list[_Place], share: ExpertShare) -> Tensor:
        """Fill the share's box in the tensor of all experts from the boxes that the files hold."""
        axis = shard_axis(name)
        views = [self._handles[place.file].get_slice(key) for place in places]
        shape = views[0].get_shape()
        shape[axis] *= places[0].shards
        wanted = share.index(name, tuple(shape))
        filled, out = 0, None
        for place, view in zip(places, views, strict=True):
            first = place.first_expert or 0
            held = ExpertShare(range(first, first + view.get_shape()[0]), place.shard, place.shards)
            box = held.index(name, tuple(shape))
            common = [_overlap(a, b) for a, b in zip(wanted, box, strict=True)]
            if any(part.start >= part.stop for part in common):
                continue
            piece = view[tuple(_relative(part, b) for part, b in zip(common, box, strict=True))]
            if out is None:
                out = piece.new_empty([part.stop - part.start for part in wanted])
            out[tuple(_relative(part, w) for part, w in zip(common, wanted, strict=True))] = piece
            filled += piece.numel()
        if out is None or filled != out.numel():
            count = len(share.experts)
            found = 0 if out is None else filled * count // out.numel()
            raise CheckpointError(f"{self.path}: '{key}' has {found} of {count} experts")
        return out

    def restore_rng(self, world: World) -> bool:
        """Set this rank's generators; False if the checkpoint is of fewer ranks."""
        file = self.path / f"rng-{world.rank}.safetensors"
        if not file.exists():
            return False
        set_rng_state(load_file(file))
        return True


def persistent_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """What is not learnt by gradients but belongs to the model's state."""
    parameters = dict(model.named_parameters())
    return {
        name: t for name, t in model.state_dict(keep_vars=True).items() if name not in parameters
    }


def _overlap(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _relative(part: slice, box: slice) -> slice:
    return slice(part.start - box.start, part.stop - box.start)


@torch.no_grad()
def load_weights(
    model: torch.nn.Module, reader: Reader, expert_names: set[str], share: ExpertShare
) -> None:
    """Copy master weights into a model that DeepSpeed has not wrapped yet.

    Persistent buffers too; those that the checkpoint lacks stay as they are.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    known = set(reader.names())
    buffers = {name: t for name, t in persistent_buffers(model).items() if name in known}
    for name, target in {**dict(model.named_parameters()), **buffers}.items():
        value = reader.tensor(name, share=share if name in expert_names else None)
        if value.shape != target.shape:
            raise CheckpointError(
                f"{reader.path}: '{name}' has shape {list(value.shape)}, the model's is "
                f"{list(target.shape)}"
            )
        target.copy_(value)
