"""A checkpoint's description of its tensors and its state, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.reading import read_json
from .folder import CheckpointError, class_names, read_manifest
from .fragments import Entry, from_json


class Contents:
    """Names, shapes and places of a checkpoint's tensors, and its state.

    Args:
        path: a checkpoint folder that :func:`verify` accepts.

    Attributes:
        state: content of ``state.json``.
        class_names: of the model, by label; None if the data had none.

    Raises:
        CheckpointError: manifest or state cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        manifest = read_manifest(path)
        self.files = set(manifest.files)
        try:
            self.state: dict[str, Any] = read_json(path / "state.json")
            self.entries: dict[str, Entry] = from_json(manifest.tensors)
            self.class_names = class_names(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error})") from None

    def names(self) -> list[str]:
        """Return the names of the weights, including persistent buffers."""
        return sorted(self.entries)

    def check_complete(self) -> None:
        """Raise :class:`CheckpointError` unless every element of every tensor is in a file."""
        for name, entry in self.entries.items():
            entry.check_complete(name)
