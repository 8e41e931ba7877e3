"""Each rank runs the MoE layer on its tokens; one process runs all ranks' tokens one by one.

Outputs, input gradients and the sum of the ranks' weight gradients must be equal: for references
in fp64, for kernels in fp32. If a collective did not find its partners, the script would hang.
"""

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from swin_moe import distributed, ops
from swin_moe.common import ranks
from swin_moe.config import MoEConfig
from swin_moe.distributed import Group, World
from swin_moe.models.activation_checkpoint import keep_routing
from swin_moe.moe import MoELayer, build_moe, choose_overlap, dispatcher
from swin_moe.moe.all_to_all import AllToAll

DIM, HIDDEN = 8, 12
BASE = MoEConfig(num_experts=4, gate_noise=0.0, balance="gshard", normalize_gate=True)
DROPLESS = {"capacity_factor": 0.0}
# Images of few tokens, each routed separately
MODES = {
    "apart": {"route_per_image": True, "top_k": 2},
    "experts choose": {"routing": "expert_choice", "capacity_factor": 1.5, "gate_noise": 0.0},
    "soft": {"routing": "soft", "slots_per_expert": 3},
}


class Case(NamedTuple):
    """A case: how the tokens are spread over ranks, and changes of the config."""

    moe: dict[str, Any]
    tokens: str = "equal"
    padded: bool = False
    flat: bool = False  # one all-to-all, though the group spans two nodes
    recompute: bool = False
    frozen_input: bool = False
    fused: bool = True  # kernels in fp32, otherwise references in fp64


def cases(processes: int) -> list[Case]:
    plain = [
        Case({"capacity_factor": factor, "top_k": k, "batch_prioritized": prioritized})
        for factor in (0.5, 1.0, 0.0)
        for k in (1, 2)
        for prioritized in (True, False)
    ]
    found = [*plain, Case({}, flat=True)]
    spreads = ("unequal", "empty", "one expert")
    for degree in (1, 2, 3):
        chunked: dict[str, Any] = {"overlap_degree": degree}
        for tokens in spreads:
            found.append(Case({**chunked, **DROPLESS, "top_k": 2}, tokens))
            found.append(Case(chunked, tokens))
            found.append(Case(chunked, tokens, padded=True))
        found += [Case({**chunked, **mode}) for mode in MODES.values()]
        found.append(Case({**chunked, "num_shared_experts": 1}, "unequal"))
        found.append(Case({**chunked, "top_k": 2}, recompute=True))
        found.append(Case(chunked, frozen_input=True))
    # More ranks than experts: each expert is cut in two, or in as many parts as there are ranks.
    for experts in {processes // 2, 1}:
        sharded: dict[str, Any] = {"num_experts": experts}
        found += [Case({**sharded, **DROPLESS}, tokens) for tokens in spreads]
        found.append(Case({**sharded, "top_k": experts}, padded=True))
        found += [Case({**sharded, **mode, "top_k": 1}) for mode in MODES.values()]
        for degree in (2, 3):
            found.append(Case({**sharded, "overlap_degree": degree}, "unequal"))
            found.append(Case({**sharded, "overlap_degree": degree}, "empty", padded=True))
        found.append(Case({**sharded, "fc2_bias": False}, recompute=True))
    return found


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-9 if actual.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tokens_of(rank: int, case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    images = {"unequal": 1 + 2 * rank, "empty": 2 * rank}.get(case.tokens, 2)
    x = torch.randn(images, 2, 3, DIM, generator=generator)
    return x.abs() if case.tokens == "one expert" else x


def build(case: Case, moe: MoEConfig, group: Group | None) -> MoELayer:
    torch.manual_seed(0)
    layer = build_moe(DIM, HIDDEN, moe, group)
    layer.experts.reset_parameters(0.3)
    layer.padded = case.padded
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            if name.endswith("bias"):
                generator = torch.Generator().manual_seed(1)
                shape = (moe.num_experts, HIDDEN if "fc1" in name else DIM)
                whole = torch.randn(shape, generator=generator)
                parameter.copy_(layer.experts.share.of(name, whole))
        if case.tokens == "one expert":  # positive tokens all choose the last expert
            weight = torch.arange(moe.num_experts)[:, None].float()
            layer.router.weight.copy_(weight.expand(-1, DIM))
    return layer if case.fused else layer.double()


def run(layer: MoELayer, x: torch.Tensor, case: Case):
    x = x.to(layer.router.weight.dtype, copy=True).requires_grad_(not case.frozen_input)
    if case.recompute and layer.group.size > 1:
        result = checkpoint(layer, x, use_reentrant=False, context_fn=keep_routing)
    else:
        result = layer(x)
    (result.output.square().sum() + result.aux_loss).backward()
    return result, x.grad


def check(world: World, case: Case) -> None:
    moe = MoEConfig(**{**BASE.model_dump(), **case.moe})
    group = replace(world.expert, intra=None, inter=None) if case.flat else world.expert
    mine = build(case, moe, group)
    result, grad = run(mine, tokens_of(world.rank, case), case)
    whole = build(case, moe, None)
    for rank in range(world.size):
        expected, expected_grad = run(whole, tokens_of(rank, case), case)
        if rank == world.rank:
            close(result.output, expected.output)
            close(result.aux_loss, expected.aux_loss)
            close(result.stats.counts, expected.stats.counts)
            close(result.stats.sums[:5], expected.stats.sums[:5])
            close(result.stats.extremes, expected.stats.extremes)
            assert result.stats.sums[5] > 0
            if not case.frozen_input:
                close(grad, expected_grad)
    for (name, parameter), reference in zip(
        mine.named_parameters(), whole.parameters(), strict=True
    ):
        gradient, wanted = parameter.grad, reference.grad
        if name.startswith("experts."):
            close(gradient, mine.experts.share.of(name, wanted))
        else:
            close(distributed.all_reduce_(gradient), wanted)


def check_order(world: World) -> None:
    """Chunks travel while others are computed, in both passes."""
    events = []
    start, wait = AllToAll.start, dispatcher.Ferry.wait

    def starting(self, x, out, back=False):
        events.append("home" if back else "out")
        return start(self, x, out, back)

    def waiting(self, c):
        events.append(c)
        return wait(self, c)

    case = Case({"overlap_degree": 3})
    layer = build(case, MoEConfig(**{**BASE.model_dump(), **case.moe}), world.expert)
    AllToAll.start, dispatcher.Ferry.wait = starting, waiting
    try:
        x = tokens_of(world.rank, case).requires_grad_()
        result = layer(x)
        forward, events = events, []
        result.output.sum().backward()
    finally:
        AllToAll.start, dispatcher.Ferry.wait = start, wait
    assert forward == ["out"] * 3 + [0, "home", 1, "home", 2, "home", 0, 1, 2], forward
    assert events == ["out"] * 3 + [2, "home", 1, "home", 0, "home", 2, 1, 0], events


EQUAL: list[tuple[Case, int]] = [  # with the exchanges of lengths of three passes
    (Case({"capacity_factor": 1.0, "top_k": 2}, padded=True), 1),
    (Case({"overlap_degree": 3}, padded=True, recompute=True), 1),
    (Case(MODES["experts choose"]), 1),
    (Case({**MODES["soft"], "overlap_degree": 2}, recompute=True), 1),
    (Case({"num_experts": 1, "top_k": 1}, padded=True), 1),
    (Case(DROPLESS), 3),
    (Case({"capacity_factor": 1.0}), 3),
]


def check_equal_tokens(world: World) -> None:
    """Lengths that are equal by promise are exchanged once; the results are the same bit by bit."""
    for case, wanted in EQUAL:
        moe = MoEConfig(**{**BASE.model_dump(), **case.moe})
        found, exchanges = [], []
        for equal in (False, True):
            layer = build(case, moe, world.expert)
            layer.schedules.equal_tokens = equal
            with counting() as gathered:
                for _ in range(3):
                    layer.zero_grad()
                    result, grad = run(layer, tokens_of(world.rank, case), case)
            exchanges.append(len(gathered))
            gradients = [p.grad for p in layer.parameters()]
            found.append([result.output, result.aux_loss, grad, *gradients])
        assert exchanges == [6 if case.recompute else 3, wanted], (case, exchanges)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), case


@contextlib.contextmanager
def counting():
    """Count the exchanges of lengths."""
    found: list[None] = []
    gather = dist.all_gather_into_tensor

    def counted(*args, **kwargs):
        found.append(None)
        return gather(*args, **kwargs)

    dist.all_gather_into_tensor = counted
    try:
        yield found
    finally:
        dist.all_gather_into_tensor = gather


def check_new_shapes(world: World) -> None:
    """Each new number of tokens is agreed on once, also without gradients."""
    case = Case({}, padded=True)
    layer = build(case, BASE, world.expert)
    layer.schedules.equal_tokens = True
    with counting() as gathered:
        for images in (2, 3, 2, 3):
            with torch.inference_mode():
                layer(torch.randn(images, 2, 3, DIM))
            layer(torch.randn(images, 2, 3, DIM)).output.sum().backward()
    assert len(gathered) == 2, gathered


def check_broken_promise(world: World) -> None:
    """All ranks report unequal numbers of tokens when they first meet."""
    case = Case({}, "unequal", padded=True)
    layer = build(case, BASE, world.expert)
    layer.schedules.equal_tokens = True
    with pytest.raises(ValueError, match="equally many tokens on all ranks") as error:
        layer(tokens_of(world.rank, case))
    assert "2 places on rank 0 of the expert group and 6 on rank 1" in str(error.value)


def check_tuning(world: World) -> None:
    """All ranks choose the same degree; layers and generators do not change."""
    case = Case({"overlap_degree": "auto"})
    layers = [
        build(case, MoEConfig(**{**BASE.model_dump(), **case.moe}), world.expert) for _ in range(2)
    ]
    before, weights = torch.get_rng_state(), [p.clone() for p in layers[0].parameters()]
    line = choose_overlap(layers, (4, 2, 3), world.device, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, w) for p, w in zip(layers[0].parameters(), weights, strict=True))
    assert all(p.grad is None for p in layers[0].parameters())
    chosen = torch.tensor([layers[0].overlap_degree, -layers[1].overlap_degree])
    assert distributed.all_reduce_(chosen.clone(), "max").equal(chosen)
    assert line.endswith(f"takes {layers[1].overlap_degree}"), line


def work(folder: Path) -> None:
    _, _, size = ranks.environment_rank()
    if size == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # two nodes of two
    world = distributed.init(expert_parallel_size=size)
    assert (world.expert.intra is not None) == (size == 4)
    check_order(world)
    check_tuning(world)
    check_equal_tokens(world)
    check_new_shapes(world)
    check_broken_promise(world)
    passed = 0
    for fused in (True, False):
        if not fused:
            ops.use_references()
        for case in cases(size):
            try:
                check(world, case._replace(fused=fused))
            except BaseException:
                print(f"rank {world.rank}, fused={fused}: {case}", file=sys.stderr, flush=True)
                raise
            passed += 1
    if world.is_main:
        (folder / "passed").write_text(str(passed))
