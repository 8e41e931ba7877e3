"""From the config sections of a model to the model."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import ModelConfig, MoEConfig
from ..distributed import Group
from .swin import MoEOutput, SwinTransformer


def build(model: ModelConfig, moe: MoEConfig, expert_group: Group | None = None) -> SwinTransformer:
    """The model of two config sections; weights are drawn from torch's global generator."""
    return SwinTransformer(model, moe, expert_group)


def split_output(output: Tensor | MoEOutput) -> tuple[Tensor, MoEOutput | None]:
    """Logits, and the whole output where the model has MoE layers."""
    return (output.logits, output) if isinstance(output, MoEOutput) else (output, None)


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that hold this rank's experts only ([E_local, ...])."""
    return {name for name, _ in model.named_parameters() if ".experts." in name}
