import random

import numpy as np
import pytest
import torch

from .helpers import OPENED


@pytest.fixture(autouse=True)
def _loaders_are_closed():
    """Close loaders after each test; otherwise the collector waits for their workers later."""
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture
def generator_states():
    """Return a function that returns the comparable state of every global CPU generator."""

    def read():
        name, keys, *rest = np.random.get_state()
        torch_state = torch.default_generator.get_state().numpy().tobytes()
        return random.getstate(), name, keys.tobytes(), rest, torch_state

    return read
