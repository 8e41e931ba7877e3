"""One thread per test process: they run side by side, and more threads would only wait."""

import torch

torch.set_num_threads(1)
