"""Each rank runs the MoE layer on its tokens, and on one process all ranks' tokens one by one.

Outputs, input gradients and the sum of the ranks' weight gradients must be equal: the reference
backend in fp64, the fused one in the fp32 that its kernels have.
"""

import sys
from pathlib import Path

import torch

from swin_moe import distributed
from swin_moe.config import MoEConfig
from swin_moe.distributed import Group, World
from swin_moe.moe import MoELayer, build_moe

E, DIM, HIDDEN = 4, 6, 10


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-9 if actual.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tokens_of(rank: int, case: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    count = {"unequal": 5 + 8 * rank, "empty": 12 * rank}.get(case, 12)
    x = torch.randn(count, DIM, generator=generator)
    return x.abs() if case == "one expert" else x


def build(moe: MoEConfig, group: Group | None) -> MoELayer:
    torch.manual_seed(0)
    layer = build_moe(DIM, HIDDEN, moe, group)
    layer.experts.reset_parameters(0.3)
    if moe.balance_weight == 0:  # "one expert": positive tokens all prefer the last
        with torch.no_grad():
            layer.router.weight.copy_(torch.arange(E)[:, None].float().expand(E, DIM))
    return layer.double() if moe.backend == "reference" else layer


def run(layer: MoELayer, x: torch.Tensor):
    x = x.to(layer.router.weight.dtype, copy=True).requires_grad_()
    result = layer(x)
    (result.output.square().sum() + result.aux_loss).backward()
    return result, x.grad


def check(world: World, case: str, moe: MoEConfig) -> None:
    mine = build(moe, world.expert)
    result, grad = run(mine, tokens_of(world.rank, case))
    whole = build(moe, None)
    for rank in range(world.size):
        expected, expected_grad = run(whole, tokens_of(rank, case))
        if rank == world.rank:
            close(result.output, expected.output)
            close(result.aux_loss, expected.aux_loss)
            for actual, wanted in zip(result.stats, expected.stats, strict=True):
                close(actual, wanted)
            close(grad, expected_grad)
    local = E // world.size
    own = slice(world.rank * local, (world.rank + 1) * local)
    whole_gradients = {name: p.grad for name, p in whole.named_parameters()}
    for name, parameter in mine.named_parameters():
        gradient = parameter.grad
        if ".weight" in name and "router" in name:
            gradient = distributed.all_reduce_(gradient)
            close(gradient, whole_gradients[name])
        elif name.startswith("experts."):
            close(gradient, whole_gradients[name][own])


def main() -> None:
    world = distributed.init(expert_parallel_size=distributed.environment_rank()[2])
    base = MoEConfig(num_experts=E, gate_noise=0.0, balance="gshard", normalize_gate=True)
    cases = [
        (f"capacity {factor}", {"capacity_factor": factor, "top_k": k, "batch_prioritized": bpr})
        for factor in (0.5, 1.0, 0.0)
        for k in (1, 2)
        for bpr in (True, False)
    ]
    cases += [(name, {"capacity_factor": 0.0}) for name in ("unequal", "empty")]
    cases += [("one expert", {"capacity_factor": f, "balance_weight": 0.0}) for f in (0.0, 1.25)]
    for backend in ("reference", "fused"):
        for case, settings in cases:
            check(world, case, base.model_copy(update={**settings, "backend": backend}))
    if world.is_main:
        (Path(sys.argv[1]) / "passed").write_text(str(2 * len(cases)))
    distributed.shutdown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
