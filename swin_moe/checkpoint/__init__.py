"""Checkpoints by logical name: weights, optimizer, position and generators; no pickle.

One folder per checkpoint, ``step-00000042``::

    rank-00000.safetensors    of rank 0: spans of the flattened tensors (fp32 master weights, and
                              their moments as <name>.exp_avg, <name>.exp_avg_sq), buffers, and the
                              states of its generators
    state.json, config.yaml   position, metrics; the resolved config
    classes.json              names of the classes by label, if the data has names
    manifest.json             size and SHA-256 of each file, and which file has which span

The rank that updates an element writes it: nothing is gathered, and no element is written twice.
The manifest describes whole tensors by global expert index, so that any number of processes,
expert-parallel size and ZeRO stage can read the checkpoint. The folder is written under another
name, the manifest last, and then renamed: one with the right name and a valid manifest is complete.
"""

from typing import TYPE_CHECKING

from ..common.deferred import exports
from .folder import (
    CheckpointError,
    choose,
    class_names,
    clear_partial,
    find,
    known_classes,
    latest,
    list_checkpoints,
    read_newest,
    set_aside,
    set_aside_newer,
    verify,
)
from .fragments import Fragment, whole_fragments

if TYPE_CHECKING:
    from .reader import Reader, load_buffers, load_weight, load_weights, persistent_buffers
    from .reshard import reshard
    from .writer import Saved, Writer

__all__ = [
    "CheckpointError",
    "Fragment",
    "Reader",
    "Saved",
    "Writer",
    "choose",
    "class_names",
    "clear_partial",
    "find",
    "known_classes",
    "latest",
    "list_checkpoints",
    "load_buffers",
    "load_weight",
    "load_weights",
    "persistent_buffers",
    "read_newest",
    "reshard",
    "set_aside",
    "set_aside_newer",
    "verify",
    "whole_fragments",
]

# Commands that only list folders must not wait for torch.
__getattr__ = exports(
    __name__,
    {
        **dict.fromkeys(("Reader", "load_buffers", "load_weight", "load_weights"), "reader"),
        **{"persistent_buffers": "reader", "reshard": "reshard"},
        **dict.fromkeys(("Saved", "Writer"), "writer"),
    },
)
