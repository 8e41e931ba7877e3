"""Keys of earlier versions: read under their new names, or passed over, with a warning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Key = tuple[str, ...]

RENAMED: dict[Key, Key] = {
    ("faults", "hang_minutes"): ("faults", "hang_timeout_s"),
    ("moe", "balance_weight"): ("moe", "aux_loss_weight"),
    ("moe", "bias_update_rate"): ("moe", "expert_bias_update_rate"),
    ("train", "accumulation_steps"): ("train", "gradient_accumulation_steps"),
    ("zero", "offload"): ("zero", "offload_optimizer"),
    ("zero", "offload_weights"): ("zero", "offload_param"),
}

# Keys that have no meaning any more, and why.
GONE: dict[Key, str] = {
    ("ops", "allow_unverified"): "each kernel is tried before its first use on a machine",
}


def present_name(key: Key) -> Key:
    """Return the present name of a key."""
    return RENAMED.get(key[:2], key[:2]) + key[2:]


def rename(raw: dict[str, Any], origins: dict[Key, str]) -> Iterator[tuple[str, str]]:
    """Move the values of former keys to their new names, and remove keys that are gone, in place.

    Yields:
        the place of the former key, and a line with its new name.

    Raises:
        ValueError: both names are stated.
    """
    for old, new in RENAMED.items():
        section = raw.get(old[0])
        if not isinstance(section, dict) or old[1] not in section:
            continue
        before, now = ".".join(old), ".".join(new)
        if new[1] in section:
            place = f"{origins[old]}: " if old in origins else ""
            raise ValueError(
                f"{place}{before} is the former name of {now}, which is stated, too: remove it"
            )
        place = origins.pop(old, "")
        section[new[1]] = _value(old[1], section.pop(old[1]))
        if place:
            origins[new] = place
        unit = " (in seconds)" if old[1] == "hang_minutes" else ""
        yield place, f"{before} is called {now}{unit} now"
    for key, why in GONE.items():
        section = raw.get(key[0])
        if isinstance(section, dict) and section.pop(key[1], None) is not None:
            yield origins.pop(key, ""), f"{'.'.join(key)} is gone and has no effect: {why}"
    moe = raw.get("moe")
    if isinstance(moe, dict) and moe.get("backend") == "reference":
        moe["backend"] = "fused"
        ops = raw.setdefault("ops", {})
        if isinstance(ops, dict):
            ops["fused"] = False  # also if stated: the former key had the last word in MoE layers
        yield origins.get(("moe", "backend"), ""), "moe.backend=reference is ops.fused=false now"


def _value(key: str, value: Any) -> Any:
    """Convert a value to the unit of the new key."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return 60.0 * value if key == "hang_minutes" and is_number else value
