"""Find configs that claim a mixture of experts but have no MoE block."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, MoEConfig
from .variants import VARIANTS, default_moe_blocks

Key = tuple[str, ...]

_DENSE_SWIN_MOE = "swin_moe_small_dense_window12_192_22k"


def dense_by_mistake(
    config: Architecture, raw: dict[str, Any], origins: dict[Key, str], saved: bool = False
) -> tuple[Key, str] | None:
    """Find the key that claims a mixture of experts, although the model has no MoE block.

    The claim is a name or family of such models, or any stated key of ``moe``. A file that states
    ``moe.blocks`` may also state other keys at their defaults, since a run writes all keys of a
    dense model. ``moe.blocks=[]`` on the command line makes a model dense on purpose.

    Args:
        raw: the stated values.
        origins: their files or overrides, as far as known.
        saved: a run wrote the file, with all keys: only overrides count.

    Returns:
        the key and a message, or None.
    """
    if config.moe.enabled or _overridden(("moe", "blocks"), raw, origins):
        return None
    model, moe = raw.get("model") or {}, raw.get("moe") or {}
    defaults = MoEConfig()
    blocks = f"write moe.blocks: {default_moe_blocks(config.model.depths)}"
    mends: dict[Key, str] = {}
    for key in [key for key in moe if key != "blocks"]:
        changed = getattr(config.moe, key) != getattr(defaults, key)
        if changed or "blocks" not in moe or _overridden(("moe", key), raw, origins):
            mends["moe", key] = f"{blocks}, or leave moe.{key} out"
    name = model.get("name")
    if name == "swinv2_moe":
        mends["model", "name"] = f"{blocks}, or model.name: swinv2"
    elif name in VARIANTS and VARIANTS[name]["moe"]:
        mends["model", "name"] = "leave moe.blocks out, or choose a dense model.name"
    elif name == "swin_moe" or (model.get("family") == "swin_moe" and name not in VARIANTS):
        key = "name" if name == "swin_moe" else "family"
        mends["model", key] = f"{blocks}, or model.name: {_DENSE_SWIN_MOE} with this shape"
    for path, mend in mends.items():
        if not saved or _overridden(path, raw, origins):
            claim = f"{'.'.join(path)}={raw[path[0]][path[1]]}"
            return path, f"{claim}, but moe.blocks is empty and the model would be dense: {mend}"
    return None


def _overridden(path: Key, raw: dict[str, Any], origins: dict[Key, str]) -> bool:
    """Return whether the command line states a key or its whole section."""
    stated = path[1] in (raw.get(path[0]) or {})
    places = (origins.get(path, ""), origins.get(path[:1], ""))
    return stated and any(place.startswith("override") for place in places)
