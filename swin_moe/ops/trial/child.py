"""The process that tries kernels: ``python -m swin_moe.ops.trial.child DESCRIPTOR GPU THREADS``.

It reads signatures as JSON from its standard input and writes a JSON object a line to the
descriptor: the number of a signature when its trial begins, and again with the choice.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from ...common.fork_server import die_with_parent
from ...common.text import reason
from .. import choice
from ..signature import Choice, Signature
from . import checks
from .cases import TRIALS
from .checks import Problem


def try_kernel(signature: Signature) -> Choice:
    """Check the kernel of a signature, and time it."""
    dtype = getattr(torch, signature.dtype)
    try:
        return TRIALS[signature.op](signature.device, dtype, signature.shape)
    except Problem as problem:
        return Choice(False, f"the kernel {problem}")
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            return Choice(False, "no memory was left to try its kernel", lasting=False)
        checks.broken = True
        return Choice(False, f"the kernel failed: {reason(error)}")


def main() -> None:
    """Try all signatures in order, until one may have broken this process."""
    die_with_parent()
    descriptor, gpu, threads = map(int, sys.argv[1:4])
    torch.set_num_threads(threads)
    choice.trust_kernels()

    def tell(message: dict[str, object]) -> None:
        os.write(descriptor, (json.dumps(message) + "\n").encode())

    signatures = json.load(sys.stdin)
    if any(device == "cuda" for _, device, *_ in signatures):
        torch.cuda.set_device(gpu)
        torch.empty(1, device="cuda")  # no trial begins without a context
    for number, (op, device, dtype, shape) in enumerate(signatures):
        tell({"signature": number})
        found = try_kernel(Signature(op, device, dtype, tuple(shape)))
        tell({"signature": number, "choice": list(found)})
        if checks.broken and device == "cuda":
            return  # an illegal access ends all later work of its process; another one goes on


if __name__ == "__main__":
    main()
