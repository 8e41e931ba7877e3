"""Unverified CUDA kernels are on in these tests, which verify them on a machine with a GPU."""

import torch

from swin_moe import ops

if torch.cuda.is_available():
    ops.allow_unverified()
