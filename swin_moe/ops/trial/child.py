"""The process that tries kernels: ``python -m swin_moe.ops.trial.child DESCRIPTOR GPU``.

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
from .cases import TRIALS
from .checks import Problem


def try_kernel(signature: Signature) -> Choice:
    """Check the kernel of a signature, and time it."""
    dtype = getattr(torch, signature.dtype)
    try:
        return TRIALS[signature.op](signature.device, dtype, signature.shape)
    except Problem as problem:
        return Choice(False, f"the kernel {problem}")
    except torch.OutOfMemoryError:
        return Choice(False, "the device had no memory left to try its kernel", lasting=False)
    except Exception as error:
        return Choice(False, f"the kernel failed: {reason(error)}")


def main() -> None:
    """Try all signatures in order."""
    die_with_parent()
    descriptor, gpu = map(int, sys.argv[1:3])
    choice.trust_kernels()

    def tell(message: dict[str, object]) -> None:
        os.write(descriptor, (json.dumps(message) + "\n").encode())

    for number, (op, device, dtype, shape) in enumerate(json.load(sys.stdin)):
        tell({"signature": number})
        if device == "cuda":
            torch.cuda.set_device(gpu)
        found = try_kernel(Signature(op, device, dtype, tuple(shape)))
        tell({"signature": number, "choice": list(found)})


if __name__ == "__main__":
    main()
