"""Fitting weights to a model of another image size, window, number of classes or experts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import ModelConfig, MoEConfig
from ..models.position import resize_bias_table, resize_position_embedding
from .files import State, WeightsError

HEAD = ("head.weight", "head.bias")


@dataclass
class Fit:
    """Weights fitted to a model.

    Attributes:
        state: the tensors in the model's shapes.
        resized: name to the shape in the file.
        head: a text on a head for other classes, empty if it fits.
        missing: tensors of the model that the file lacks.
        left_over: tensors of the file that the model lacks.
    """

    state: State = field(default_factory=dict)
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    head: str = ""
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)


Grid = tuple[int, int]  # rows and columns of tokens


def fit(state: State, target: State, source_grid: Grid, target_grid: Grid) -> Fit:
    """Bring weights into the shapes of ``target`` (on any device, meta included).

    V1's bias tables and position embeddings are resized bicubically; the patch embedding is adapted
    to other channels as in timm. A 1K head takes its rows of a 22K one; a head for other classes
    keeps the model's initialisation. V2 has nothing to resize: its coordinates are computed.

    Args:
        source_grid: (rows, columns) of the file's absolute position embeddings.
        target_grid: of the model's.

    Raises:
        WeightsError: a tensor's shape cannot be mapped.
    """
    result = Fit(left_over=[name for name in state if name not in target and name not in HEAD])
    for name, wanted in target.items():
        if name in HEAD:
            continue
        if name not in state:
            result.missing.append(name)
            continue
        tensor = state[name]
        if tensor.shape != wanted.shape:
            result.resized[name] = tuple(tensor.shape)
            tensor = _resize(name, tensor, wanted, source_grid, target_grid)
            assert tensor.shape == wanted.shape, name
        result.state[name] = tensor
    _fit_head(state, target, result)
    return result


def _resize(name: str, tensor: Tensor, wanted: Tensor, source: Grid, target: Grid) -> Tensor:
    if tensor.ndim != wanted.ndim:
        raise WeightsError(_unmappable(name, tensor, wanted))
    if name.endswith("relative_position_bias_table") and tensor.shape[1:] == wanted.shape[1:]:
        return resize_bias_table(tensor, (math.isqrt(len(wanted)) + 1) // 2)
    fits = tensor.shape[1:2] == (source[0] * source[1],)
    if name == "absolute_pos_embed" and fits and tensor.shape[2:] == wanted.shape[2:]:
        return resize_position_embedding(tensor, source, target)
    sides = tensor.shape[:1] + tensor.shape[2:]
    if name == "patch_embed.proj.weight" and sides == wanted.shape[:1] + wanted.shape[2:]:
        return _other_channels(tensor, wanted.shape[1])
    raise WeightsError(_unmappable(name, tensor, wanted))


def _other_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt a patch embedding [O, I, p, p]; a grey image in all channels gives the same result."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // weight.shape[1]), 1, 1)[:, :channels]
    return repeated * (weight.shape[1] / channels)


def _unmappable(name: str, tensor: Tensor, wanted: Tensor) -> str:
    hint = ""
    if "spatial_mlp" in name:
        hint = " (SwinMLP's weights belong to one window size)"
    elif ".experts." in name or ".router." in name:
        hint = " (the number of experts differs)"
    return (
        f"{name} has shape {list(tensor.shape)}, the model's is {list(wanted.shape)}: cannot be "
        f"mapped{hint}"
    )


def _fit_head(state: State, target: State, result: Fit) -> None:
    if HEAD[0] not in target:
        result.left_over += [name for name in HEAD if name in state]
        return
    wanted = target[HEAD[0]].shape
    if len(held := [name for name in HEAD if name in state]) == 1:
        raise WeightsError(f"the file has {held[0]} and not the other half of the head")
    found = state[HEAD[0]].shape if held else None
    if found == wanted:
        result.state |= {name: state[name] for name in HEAD}
    elif found and (found[0], wanted[0]) == (21841, 1000) and found[1] == wanted[1]:
        rows = rows_22k_to_1k()
        result.state |= {name: state[name][rows] for name in HEAD}
        result.head = "21841 → 1000 classes by their rows"
    else:
        result.missing += HEAD
        what = f"the file's is for {found[0]} of width {found[1]}" if found else "the file has none"
        result.head = f"re-initialised for {wanted[0]} classes ({what})"


def rows_22k_to_1k() -> Tensor:
    """Return the row of the official 22K head for each ImageNet-1K class, [1000] int64.

    It is the class's place in the sorted list of all synsets. Teddy bear is not among them; the
    official ``map22kto1k`` gives it row 5564.
    """
    from timm.data import ImageNetInfo  # imports all of timm

    synsets = ImageNetInfo("imagenet21k-goog").label_names()
    place = {synset: row for row, synset in enumerate(synsets)}
    classes = ImageNetInfo("imagenet1k").label_names()
    return torch.tensor([place.get(synset, 5564) for synset in classes])


# --------------------------------------------------------------------------------------------
# Config keys from tensors


def infer_model(state: State, dropped: State) -> tuple[dict[str, object], dict[str, object]]:
    """Infer keys of the sections ``model`` and ``moe`` from weights in our names.

    Args:
        dropped: the file's buffers, from which alone V2's window follows.

    Returns:
        the known keys of both sections, without ``window_size`` for V2 files without buffers. The
        image size is the smallest that gives these windows.

    Raises:
        WeightsError: the names or shapes are not those of a Swin model.
    """
    try:
        return _infer_model(state, dropped)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError("the tensors' shapes are not those of a Swin model") from None


def _infer_model(state: State, dropped: State) -> tuple[dict[str, object], dict[str, object]]:
    blocks: dict[int, set[int]] = {}
    for name in state:
        if found := re.match(r"layers\.(\d{1,4})\.blocks\.(\d{1,4})\.", name):
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
    stages = [blocks.get(stage, set()) for stage in range(len(blocks))]
    gaps = any(not found or max(found) >= len(found) for found in stages)
    if gaps or not stages or "patch_embed.proj.weight" not in state:
        raise WeightsError("a Swin model has a patch embedding and stages of blocks without gaps")
    depths = [len(found) for found in stages]
    embed_dim, in_chans, patch_size = state["patch_embed.proj.weight"].shape[:3]
    model: dict[str, object] = {
        "embed_dim": embed_dim,
        "in_chans": in_chans,
        "patch_size": patch_size,
        "patch_norm": "patch_embed.norm.weight" in state,
        "ape": "absolute_pos_embed" in state,
        "depths": depths,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "qkv_bias": any(name.endswith(("attn.qkv.bias", "attn.q_bias")) for name in state),
    }
    model |= _infer_family(state, depths)
    model |= _infer_feed_forward(state, embed_dim)
    windows = _stage_windows(state, dropped)
    if windows:
        model["window_size"] = max(windows.values())
        # The smallest grid that does not clip the window: the last stage is one window.
        grid = min(windows.values()) * 2 ** (len(depths) - 1)
        model["img_size"] = grid * patch_size
        for stage, window in windows.items():
            if window != min(max(windows.values()), grid >> max(stage, 0)):
                sizes = [size for _, size in sorted(windows.items())]
                raise WeightsError(f"its stages have windows {sizes}: no single window_size fits")
    if "absolute_pos_embed" in state:  # a square, unless the file states its size
        model["img_size"] = math.isqrt(state["absolute_pos_embed"].shape[1]) * patch_size
    if pretrained := _pretrained_windows(dropped, len(depths)):
        model["pretrained_window_sizes"] = pretrained
    return model, _infer_moe(state, depths)


def _infer_family(state: State, depths: list[int]) -> dict[str, object]:
    first = [f"layers.{stage}.blocks.0" for stage in range(len(depths))]
    extra = [int(n.split(".")[3]) for n in state if n.endswith("norm3.weight")]
    found: dict[str, object] = {"extra_norm_every_n_blocks": min(extra) + 1 if extra else 0}
    for family, key, axis in (
        ("swinv2", "attn.logit_scale", 0),
        ("swin", "attn.relative_position_bias_table", 1),
        ("swin_moe", "attn.cpb_mlp.2.weight", 0),
        ("swin_mlp", "spatial_mlp.weight", 0),
    ):
        if f"{first[0]}.{key}" in state:
            tensors = [state[f"{name}.{key}"] for name in first]
            heads = [t.shape[axis] // (t.shape[1] if family == "swin_mlp" else 1) for t in tensors]
            return found | {"name": family, "family": family, "num_heads": heads}
    raise WeightsError("these are not the weights of a Swin model: neither attention nor MLP")


def _infer_feed_forward(state: State, embed_dim: int) -> dict[str, object]:
    low, high = 0.0, math.inf  # hidden = int(dim · ratio) in every stage
    for name, weight in state.items():
        if name.endswith(("mlp.fc1.weight", "mlp.experts.fc1.weight")):
            dim, hidden = embed_dim << int(name.split(".")[1]), weight.shape[-2]
            low, high = max(low, hidden / dim), min(high, (hidden + 1) / dim)
    if low == 0:
        raise WeightsError("a Swin model has a feed-forward in each block")
    ratio = (low + high) / 2
    for digits in range(12):  # the shortest number in the interval
        short = math.ceil(low * 10**digits) / 10**digits
        if low <= short < high:
            ratio = short
            break
    bias = any(re.search(r"\.mlp\.fc2\.bias$", n) for n in state)
    dense = any(re.search(r"\.mlp\.fc2\.weight$", n) for n in state)
    return {"mlp_ratio": ratio, "mlp_fc2_bias": bias or not dense}


def _infer_moe(state: State, depths: list[int]) -> dict[str, object]:
    found = [n for n in state if n.endswith("mlp.experts.fc1.weight")]
    if not found:
        return {}
    blocks: list[list[int]] = [[] for _ in depths]
    for name in found:
        blocks[int(name.split(".")[1])].append(int(name.split(".")[3]))
    moe: dict[str, object] = {
        "blocks": [sorted(stage) for stage in blocks],
        "num_experts": len(state[found[0]]),
        "fc2_bias": any(n.endswith("mlp.experts.fc2.bias") for n in state),
    }
    if cosine := [n for n in state if n.endswith("router.sim_matrix")]:
        moe |= {"router": "cosine", "cosine_router_dim": state[cosine[0]].shape[0]}
    return moe


def _stage_windows(state: State, dropped: State) -> dict[int, int]:
    """Return each stage's window side from a table, a grouped layer or a buffer."""
    found: dict[int, int] = {}
    for name, tensor in {**dropped, **state}.items():
        if name.endswith("relative_position_bias_table"):
            side = (math.isqrt(len(tensor)) + 1) // 2
            area = (2 * side - 1) ** 2 == len(tensor)
        elif name.endswith("spatial_mlp.weight"):
            side = math.isqrt(tensor.shape[1])
            area = side**2 == tensor.shape[1]
        elif name.endswith("relative_position_index"):
            side = math.isqrt(math.isqrt(tensor.numel()))
            area = side**4 == tensor.numel()
        else:
            continue
        if not area:
            raise WeightsError(f"{name}: windows are squares, and this one is not")
        found[_stage_of(name)] = side
    return found


def _stage_of(name: str) -> int:
    """Return the stage of any dialect's name; torchvision also counts embedding and merging."""
    if match := re.search(r"features\.(\d+)\.", name):
        return (int(match[1]) - 1) // 2
    match = re.search(r"(?:layers|stages)\.(\d+)\.", name)
    return int(match[1]) if match else 0


def _pretrained_windows(dropped: State, stages: int) -> list[int]:
    """Return the windows that scaled an official file's coordinates; empty if its own."""
    found = [0] * stages
    for name, table in dropped.items():
        match = re.search(r"layers\.(\d+)\..*relative_coords_table$", name)
        if match and (window := (table.shape[-2] + 1) // 2) > 1:
            # log2(8 (w − 1) / (p − 1) + 1) / 3 at the farthest offset
            reach = 8 * (window - 1) / (2 ** (3 * float(table.max())) - 1)
            pretrained = round(reach) + 1
            found[int(match[1])] = 0 if pretrained == window else pretrained
    return found if any(found) else []


# --------------------------------------------------------------------------------------------
# Dense to mixture of experts


def upcycle(
    state: State,
    model: ModelConfig,
    moe: MoEConfig,
    *,
    noise: float = 0.0,
    random_gate: bool = False,
) -> State:
    """Copy the dense feed-forward of each MoE block into all of its experts.

    See Sparse Upcycling, https://arxiv.org/abs/2212.05055. With normalised gates and free capacity
    the function is unchanged, since every expert computes the same.

    Args:
        noise: standard deviation of the noise on the copies, relative to the weight's own.
        random_gate: draw the linear router's weights (0.02) instead of setting them to zero.

    Raises:
        WeightsError: a block of ``moe.blocks`` has no dense feed-forward in the file.
    """
    if moe.router != "linear":
        raise WeightsError("--upcycle makes a linear router: moe.router=cosine cannot be used")
    generator = torch.Generator().manual_seed(0)
    state = dict(state)
    for stage, blocks in enumerate(moe.blocks):
        for block in blocks:
            mlp = f"layers.{stage}.blocks.{block}.mlp"
            if f"{mlp}.fc1.weight" not in state:
                raise WeightsError(f"{mlp} has no dense feed-forward to copy")
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                dense = state.pop(f"{mlp}.{name}", None)
                if dense is None:
                    continue
                copies = dense.expand(moe.num_experts, *dense.shape).clone()
                if noise and dense.ndim > 1:
                    draw = torch.randn(copies.shape, generator=generator)
                    copies += (noise * dense.std() * draw).to(copies.dtype)
                state[f"{mlp}.experts.{name}"] = copies
            gate = torch.zeros(moe.num_experts, model.embed_dim << stage)
            if random_gate:
                gate.normal_(0, 0.02, generator=generator)
            state[f"{mlp}.router.weight"] = gate
    return state
