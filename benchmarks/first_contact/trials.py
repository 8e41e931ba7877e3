"""Makes the trials by which a run chooses its kernels, in the processes that a run starts for them.

    python -m benchmarks.first_contact.trials [--device cuda] [--quick]

Swin V2 Base and Swin-MoE need these kernels. The step fails if one is refused; one that is slower
than its fallback is shown.
"""

from __future__ import annotations

import os
import tempfile

import torch

from benchmarks.first_contact import options as common
from swin_moe import ops
from swin_moe.ops import Choice, Signature, _library

SHAPES = ((8, 8, 32), (16, 16, 32))  # windows and head width of attention
IN_ALL_DTYPES = ("moe_dispatch", "moe_combine", "moe_experts")


def signatures(device: str, dtype: torch.dtype) -> list[Signature]:
    """Return what to try in a dtype; ops that run in fp32 alone are tried with fp32."""
    found = [ops.signature("window_attention", device, dtype, *shape) for shape in SHAPES]
    for op in ops.status():
        if op in IN_ALL_DTYPES or (dtype == torch.float32 and op != "window_attention"):
            found.append(ops.signature(op, device, dtype))
    return list(dict.fromkeys(found))  # on a CPU one trial covers all shapes


def problem(found: dict[Signature, Choice], wanted: list[Signature]) -> str:
    """Return which kernels were refused or are missing, or nothing."""
    bad = [f"{key}: no kernel" for key in wanted if key not in found]
    bad += [f"{key}: {choice}" for key, choice in found.items() if not choice.right]
    return f"{len(bad)} of {len(wanted)} refused: {'; '.join(bad)}" if bad else ""


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    dtypes = [torch.bfloat16, torch.float16, torch.float32][2 if options.quick else 0 :]
    wanted: list[Signature] = []
    found: dict[Signature, Choice] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # try again what was tried before on this machine
        for dtype in dtypes:
            if dtype not in _library.KERNEL_DTYPES[options.device]:
                continue
            mine = signatures(options.device, dtype)
            wanted += mine
            for key, choice in ops.decide(mine, print).items():
                found[key] = choice
                print(f"{key!s:<36} {choice}", flush=True)
            kernels = {str(key): choice._asdict() for key, choice in found.items()}
            common.write(options, kernels=kernels)
    print(ops.describe(found))
    if why := problem(found, wanted):
        raise SystemExit(why)


if __name__ == "__main__":
    main()
