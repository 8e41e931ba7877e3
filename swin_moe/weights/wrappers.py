"""Selecting one network's tensors from a training program's file, under the network's own names.

Programs nest weights in dictionaries. Wrappers of modules (DDP, FSDP, torch.compile, Lightning,
averages of weights) put their own names before or into each name. Nothing is dropped silently:
messages name the tensors that are not taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..common.text import plain
from .adapters import State
from .file_kind import WeightsError

# Parts that wrappers put anywhere in a name.
_INNER = {
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_fpw_module",
    "_checkpoint_wrapped_module",
}  # fmt: skip
# Parts that wrappers and programs put before a name.
_OUTER = _INNER | {
    "model", "net", "network", "backbone", "state_dict", "model_state_dict", "model_state",
    "weights", "params", "checkpoint",
}  # fmt: skip
# A Swin model begins with its patch embedding: ours and most, OpenMMLab's, Hugging Face's,
# torchvision's.
_FIRST = re.compile(
    r"(?:^|(?<=\.))(?:patch_embed\.proj(?:ection)?|embeddings\.patch_embeddings\.projection"
    r"|features\.0\.0)\.weight$"
)
_BLOCK = re.compile(r"(?:encoder\.)?(?:layers|stages)\.0\.blocks\.0\.|features\.1\.0\.attn\.")
_HEAD = re.compile(r"(?:head|head\.fc|classifier|fc)\.(weight|bias)")
# Prefixes of a second network: an average or a teacher of the one in training.
_SECOND = re.compile(r"(?:\b|_)(?:ema|shadow|teacher|averaged?|swa|momentum|target|k|old)(?:\b|_)")
# First parts of names that belong to no network: counters, losses, optimizers.
_NO_NETWORK = re.compile(
    r"n_averaged|num_updates|num_batches\w*|updates|initted|decay|(?:global_)?step|epoch"
    r"|(?:lr_)?scheduler\w*|optim\w*|(?:\w+_)?ema(?:_\w+)?|shadow\w*|\w*teacher\w*|\w*scaler|amp"
    r"|\w*(?:loss|criterion|metric|accuracy|confusion|auroc)\w*|\w*queue\w*|callbacks|loops"
    r"|rng\w*|center|mixup\w*"
)
# First parts of a Swin model's names in any program.
_OWN = re.compile(
    r"patch_embed|absolute_pos_embed|layers|stages|features|norm\d*|head|embeddings|encoder"
    r"|layernorm|pooler|mask_token|hidden_states_norms"
)
_LISTED = 6


def take_network(state: State, path: Path, wanted: str = "") -> tuple[State, list[str]]:
    """Return one network's tensors by its own names, and lines on other content of the file.

    Args:
        wanted: the prefix of the network to take; empty = the one in training, not its average or
            teacher.

    Raises:
        WeightsError: no network has the wanted name.
    """
    names = _without_wrappers(state)
    shown = _networks(names)
    if not shown:
        return state, []  # no Swin model: the translation will report it
    root = _choose(shown, path, wanted)
    before_it = _outer(
        next(n for s, n in names.items() if s.startswith(root) and _FIRST.fullmatch(s, len(root)))
    )
    taken: dict[str, str] = {}  # the network's own name -> the file's
    left_over: list[str] = []
    heads: dict[str, dict[str, str]] = {}  # by their prefix
    for name, full in names.items():
        short = name.removeprefix(root)
        first = short.partition(".")[0]
        if _of_another(name, root, shown):
            continue  # reported with its network
        inside = _outer(full) == before_it and not _NO_NETWORK.fullmatch(first)
        if name.startswith(root) and (inside or _OWN.fullmatch(first)):
            taken[short] = full
        elif found := _outer_head(name, root):
            before, head = found
            heads.setdefault(before, {})[head] = full
        else:
            left_over.append(full)
    own_head = any(_HEAD.fullmatch(name) for name in taken)
    if own_head and not any(name.startswith("head.") for name in taken):
        taken = _renamed(taken, taken)
    for before in sorted(heads, key=len, reverse=True):  # the nearest one is the network's
        if own_head:
            left_over += heads[before].values()
        else:
            taken, own_head = taken | _renamed(heads[before], taken), True
    notes = [*_other_networks(shown, root, path), *not_read(left_over, path)]
    return {short: state[full] for short, full in taken.items()}, notes


def _without_wrappers(state: State) -> dict[str, str]:
    """Map names without wrappers to names in the file.

    If two names would become equal (a model's and its average's), both keep their prefix.
    """
    fulls: dict[str, set[str]] = {}
    for full in state:
        fulls.setdefault(_inner(full), set()).add(full)
    contested = {_outer(full) for same in fulls.values() if len(same) > 1 for full in same}
    names: dict[str, str] = {}
    for full in state:
        before = _outer(full)
        name = (before if before in contested else "") + _inner(full)
        names[full if name in names else name] = full
    return names


def _outer(full: str) -> str:
    """Return the prefix that wrappers put before a name."""
    parts = full.split(".")
    count = next((i for i, part in enumerate(parts) if part not in _OUTER), len(parts))
    return "".join(f"{part}." for part in parts[: min(count, len(parts) - 1)])


def _inner(full: str) -> str:
    """Return a name without the wrappers' parts before and in it."""
    parts = full.removeprefix(_outer(full)).split(".")
    return ".".join([*(part for part in parts[:-1] if part not in _INNER), parts[-1]])


def _networks(names: dict[str, str]) -> dict[str, str]:
    """Map the prefix of each Swin network to that prefix in the file, for messages."""
    found: dict[str, str] = {}
    for name, full in names.items():
        if match := _FIRST.search(name):
            root, first = name[: match.start()], match[0].partition(".")[0]
            found[root] = full[: full.rindex(match[0]) if match[0] in full else full.index(first)]
    return {
        root: before.rstrip(".")
        for root, before in found.items()
        if any(n.startswith(root) and _BLOCK.match(n, len(root)) for n in names)
    }


def _of_another(name: str, root: str, roots: Iterable[str]) -> bool:
    """Return whether a name belongs to another network than the one at ``root``."""
    for other in roots:
        # A network inside ours owns all its names; one around ours, only a Swin model's.
        inner = len(other) > len(root)
        own = _OWN.fullmatch(name.removeprefix(other).partition(".")[0])
        if other != root and name.startswith(other) and (inner or own):
            return inner or not name.startswith(root)
    return False


def _choose(shown: dict[str, str], path: Path, wanted: str) -> str:
    """Return the prefix of the network to take."""
    if not wanted:
        return min(shown, key=lambda root: (bool(_SECOND.search(shown[root])), shown[root] != ""))
    for root, name in shown.items():
        if f"{name}.".startswith(f"{wanted}."):
            return root
    held = ", ".join(map(_quoted, shown.values()))
    raise WeightsError(f"{plain(path)}: holds no network '{plain(wanted)}'; it holds {held}")


def _quoted(prefix: str) -> str:
    return f"'{plain(prefix)}'" if prefix else "one without a prefix"


def _outer_head(name: str, root: str) -> tuple[str, str] | None:
    """Return prefix and name of a head that belongs to the module around the network."""
    parts = root.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        before = "".join(f"{part}." for part in parts[:count])
        if name.startswith(before) and _HEAD.fullmatch(name.removeprefix(before)):
            return before, name.removeprefix(before)
    return None


def _renamed(head: dict[str, str], network: dict[str, str]) -> dict[str, str]:
    """Rename any head to ``head``, except in programs that call it ``classifier``."""
    if any(name.startswith("embeddings.") for name in network):
        return head
    return {re.sub(r"^(classifier|fc)\.", "head.", name): full for name, full in head.items()}


def _other_networks(shown: dict[str, str], root: str, path: Path) -> list[str]:
    if len(shown) == 1:
        return []
    others = [name for other, name in shown.items() if other != root]
    return [
        f"{plain(path)} holds {len(shown)} networks: {_quoted(shown[root])} is taken, not "
        f"{', '.join(map(_quoted, others))} (`swin-moe convert IN OUT --take PREFIX` takes another)"
    ]


def not_read(left_over: list[str], path: Path) -> list[str]:
    """Return one line on tensors that are not taken, by the first part of their names."""
    if not left_over:
        return []
    groups = Counter(_outer(full) + _inner(full).partition(".")[0] for full in left_over)
    listed = [
        f"{plain(name)} ({count:,} tensors)" if count > 1 else plain(name)
        for name, count in groups.most_common(_LISTED)
    ]
    more = f" and {len(groups) - _LISTED} more" if len(groups) > _LISTED else ""
    return [f"not read from {plain(path)}: {', '.join(listed)}{more}"]
