"""On a machine with a GPU these tests are what verifies the CUDA kernels: there they are on."""

import torch

from swin_moe import ops

if torch.cuda.is_available():
    ops.allow_unverified()
