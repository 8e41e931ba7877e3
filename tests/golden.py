"""Reads the golden fixtures: inputs, weights and outputs of the official implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent / "golden"
MEASURED: dict[str, list[tuple[str, float, float]]] = {}  # fixture -> (tensor, error, atol)


class Golden:
    """A fixture folder; ``check`` compares a tensor with the stored one within its atol."""

    def __init__(self, name: str) -> None:
        self.config: dict[str, Any] = json.loads((ROOT / name / "config.json").read_text())
        self.io = load_file(ROOT / name / "io.safetensors")
        self.weights = load_file(ROOT / name / "weights.safetensors")

    def check(self, name: str, actual: Tensor) -> None:
        expected = self.io[name]
        assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
        rows = MEASURED.setdefault(self.config["fixture"], [])
        if not expected.is_floating_point():
            rows.append(
                (name, 0.0 if torch.equal(actual.to(expected.dtype), expected) else 1.0, 0.0)
            )
            assert torch.equal(actual.to(expected.dtype), expected), f"{name}: not equal"
            return
        error = (actual.detach() - expected).abs().max().item()
        atol = self.config["tensors"][name]["atol"]
        rows.append((name, error, atol))
        assert error <= atol, f"{name}: max error {error:.2e} is more than {atol:.0e}"
