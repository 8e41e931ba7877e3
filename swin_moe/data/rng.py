"""Randomness that is a pure function of a few integers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.random.mtrand import get_bit_generator, set_bit_generator


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators from ``entropy``; restore them after.

    timm and torchvision draw from all three global generators, so all three must be set. The CUDA
    generators stay untouched: ``torch.manual_seed`` would reset them too.
    """
    import torch  # not for `permutation`

    sequence = np.random.SeedSequence(entropy)
    first, second = sequence.generate_state(2).tolist()
    python, torch_state = random.getstate(), torch.default_generator.get_state()
    numpy = get_bit_generator()  # copying NumPy's state out and in takes 0.1 ms
    random.seed(first)
    torch.default_generator.manual_seed(second)
    set_bit_generator(np.random.PCG64(sequence))
    try:
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(torch_state)
        set_bit_generator(numpy)


def permutation(size: int, *entropy: int, major: np.ndarray | None = None) -> np.ndarray:
    """Return the numbers from 0 to ``size``, int64, in an order fixed by ``entropy``.

    NumPy's raw bits are the same in every version; ``Generator.permutation`` may change. The number
    in the low bits makes the keys unique and is read back after a plain sort, which takes a
    fraction of an argsort's time.

    Args:
        major: uint64 [size]: numbers are sorted by this, and shuffled where it is equal.
    """
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(size)
    low = np.uint64((1 << size.bit_length()) - 1)
    if major is not None:
        bits = int(major.max()).bit_length()
        keys = keys >> np.uint64(bits) | major << np.uint64(64 - bits)
    keys &= ~low
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    keys &= low
    return keys.view(np.int64)
