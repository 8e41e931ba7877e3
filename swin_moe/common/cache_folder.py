"""The folder for what a user's machine computes once and later runs reuse."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """Return ``$XDG_CACHE_HOME/swin_moe/<name>``, by default below ``~/.cache``.

    Returns:
        the folder, which this call makes; None if that is impossible. It may be read-only.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # then XDG's specification ignores it
            base = Path.home() / ".cache"
        folder = base / "swin_moe" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home
        return None
    return folder
