"""Randomness that is a pure function of a few integers, whatever the process did before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators from ``entropy``; restore them after.

    timm and torchvision draw from all three global generators, so all three must be set. The CUDA
    generators stay untouched: ``torch.manual_seed`` would reset them too.
    """
    first, second, third = np.random.SeedSequence(entropy).generate_state(3).tolist()
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
