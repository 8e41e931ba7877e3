import random

import numpy as np
import pytest
import torch

from .helpers import OPENED


@pytest.fixture(autouse=True)
def _loaders_are_closed():
    """Otherwise the collector waits for their workers, seconds each, in some other test."""
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture
def generator_states():
    """A function that returns the state of every global CPU generator, comparable."""

    def read():
        name, keys, *rest = np.random.get_state()
        torch_state = torch.default_generator.get_state().numpy().tobytes()
        return random.getstate(), name, keys.tobytes(), rest, torch_state

    return read
