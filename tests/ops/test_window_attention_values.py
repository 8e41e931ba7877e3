"""Window attention with NaN, infinity, logits of any size and dropout.

All of these, and parity, are tested for every instruction set.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

from swin_moe import ops
from tests.ops.test_window_attention import (
    DEVICES,
    DTYPES,
    PLACES,
    RESULTS,
    Case,
    check_parity,
    error,
    floor,
    needs_library,
    run,
)


def same_window(case: Case, row: int, column: int) -> Tensor:
    """Return [H, W] masks of each token's own window, for maps without padding."""
    number = torch.arange(case.size[0] * case.size[1]).view(1, *case.size, 1)
    windows = case.windows.split(number).squeeze(-1)  # [1, nW, N]
    own = windows[(windows == number[0, row, column]).any(-1)]
    return torch.isin(number[0, :, :, 0], own)


def check_nan_places(cosine: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    """Check that NaN appears only where it must, and that all other bits stay."""
    for case in (
        Case((4, 4), (2, 2), (8, 12), cosine=cosine),
        Case((7, 7), (3, 3), (14, 14), cosine=cosine, dropout=0.2),
    ):
        image, row, column, head, channel = 1, 5, 3, 1, 9
        window = same_window(case, row, column)
        for part, value in itertools.product(range(3), (float("nan"), float("inf"))):
            qkv, bias, scale = case.inputs(dtype, device)
            clean = run(case.fused, [qkv, bias, scale])
            qkv[image, row, column, part, head, channel] = value
            dirty = run(case.fused, [qkv, bias, scale])
            expected = torch.zeros_like(clean[0], dtype=torch.bool).unflatten(3, (case.heads, -1))
            if part == 0:
                expected[image, row, column, head] = True
            elif part == 1:
                expected[image, window, head] = True
            else:
                expected[image, window, head, channel] = True
            expected = expected.flatten(3)
            changed = dirty[0] != clean[0]
            assert not (changed & ~expected).any()
            reference = case.reference(qkv, bias, scale)
            if value != value:
                assert torch.equal(reference.isnan(), expected)
                assert torch.equal(dirty[0].isnan(), expected)
            elif part < 2:
                assert torch.equal(dirty[0].isnan(), reference.isnan())
            touched = torch.zeros_like(dirty[1], dtype=torch.bool)
            touched[image, window, :, head] = True
            assert not ((dirty[1] != clean[1]) & ~touched).any()
            others = torch.arange(case.heads) != head
            for grad, before in zip(dirty[2:], clean[2:], strict=True):
                assert torch.equal(grad[others], before[others])


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("cosine", [True, False])
def test_a_nan_shows_where_it_must_and_nowhere_else(cosine, dtype, device):
    check_nan_places(cosine, dtype, device)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("window", [4, 7])
@pytest.mark.parametrize("cosine", [True, False])
def test_non_finite_bias_and_scale(cosine, window, dtype, device):
    # Some windows have padding and several regions, some have neither.
    case = Case((window, window), (2, 0), (3 * window - 1, window), cosine=cosine)
    nan, inf = float("nan"), float("inf")
    for name, place, value in [
        ("bias", (1, 3, 5), nan),
        ("bias", (1, 3, 5), inf),
        ("bias", (1, 3), -inf),  # no key is left
        ("scale", (1,), nan),
        ("scale", (1,), inf),
        ("scale", (1,), -inf),
    ]:
        _, bias, scale = inputs = case.inputs(dtype, device)
        clean = case.fused(*inputs)
        (bias if name == "bias" else scale)[place] = value
        out, reference = case.fused(*inputs), case.reference(*inputs)
        assert torch.equal(out.isnan(), reference.isnan()), (name, place, value)
        same = (out == clean).unflatten(3, (case.heads, -1))
        assert same[:, :, :, [0, 2]].all(), (name, place, value)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("window", [4, 7])
@pytest.mark.parametrize("cosine", [True, False])
def test_a_bias_of_minus_infinity_is_a_mask(cosine, window, dtype, device):
    """The key's own gradients are zero, and its value does not matter."""
    case = Case((window, window), (1, 1), (2 * window, window), cosine=cosine)
    qkv, bias, scale = case.inputs(dtype, device)
    bias[:, :, 2::3] = float("-inf")
    bias[1, :, 0] = float("-inf")
    fused = run(case.fused, [qkv, bias, scale])
    exact = run(case.reference, [x.double() for x in (qkv, bias, scale)])
    assert fused[2][:, :, 2::3].abs().max() < 1e-30
    for name, mine, wanted in zip(RESULTS, fused, exact, strict=True):
        assert error(mine, wanted) <= floor(name, dtype, case), name
    hidden = qkv.clone()
    tokens = torch.arange(case.size[0] * case.size[1]).view(1, *case.size, 1)
    masked = case.windows.split(tokens)[0, :, 2::3].flatten()
    hidden.flatten(1, 2)[:, masked, 1:] = 3.0
    torch.testing.assert_close(case.fused(hidden, bias, scale), fused[0])


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("window", [4, 7, 12])
@pytest.mark.parametrize("cosine", [True, False])
def test_large_logits(cosine, window, dtype, device):
    """The bias has steps of 16 at the largest scale, and dot products are in the hundreds."""
    case = Case((window, window), (2, 2), (2 * window, window), 1, 2, 32, 5.0, cosine)
    qkv, bias, scale = case.inputs(dtype, device)
    bias = 16.0 * bias.round()
    qkv[:, :, :, :2] *= 1 if cosine else 6
    results = run(case.fused, [qkv, bias, scale])
    assert all(x.isfinite().all() for x in results)
    exact = case.reference(*(x.double() for x in (qkv, bias, scale)))
    assert error(results[0], exact) <= {torch.float32: 1e-4}.get(dtype, 2e-2)


# The number of tokens of windows of 7 is no multiple of a tile of rows, that of 4 and 8 is.
@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("window", [4, 7, 8])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("level", [-1000.0, -180.0, -100.0, 100.0, 1000.0])
def test_all_logits_of_a_query_may_be_moved_together(level, cosine, window, dtype, device):
    """Softmax is invariant; fp32 loses a few bits of the logits."""
    case = Case((window, window), (0, 0), (window, window), 1, 2, 16, 1.0, cosine)
    qkv, bias, scale = case.inputs(dtype, device)
    fused = run(case.fused, [qkv, bias / 8 + level, scale])
    exact = run(case.reference, [x.double() for x in (qkv, bias / 8 + level, scale)])
    for name, mine, wanted in zip(RESULTS, fused, exact, strict=True):
        assert error(mine, wanted) <= max(floor(name, dtype, case), 5e-4), name


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros_have_no_direction(device):
    case = Case((4, 4), (2, 2), (8, 8))
    qkv, bias, scale = case.inputs(device=device)
    qkv[0, 1, 2, :2], qkv[1, 3, 0, 0] = 0.0, 1e-14
    fused = run(case.fused, [qkv, bias, scale])
    exact = run(case.reference, [x.double() for x in (qkv, bias, scale)])
    for name, mine, wanted in zip(RESULTS, fused, exact, strict=True):
        assert error(mine, wanted) <= 1e-5, name
    moderate = exact[1].abs() < 1e6  # gradients of 10^12 hide all others
    assert error(fused[1][moderate], exact[1][moderate]) <= 1e-5


def dropout_mask(case: Case, dtype=torch.float32, device="cpu", function=None) -> Tensor:
    """Return each probability's factor [B, H, W, heads, N], read with values of e_j."""
    qkv, bias, scale = case.inputs(dtype, device)
    unit = torch.eye(case.tokens).view(case.tokens, 1, case.tokens)
    one_window = unit.expand(-1, case.heads, -1).unflatten(0, case.window)
    rows, columns = (n // w for n, w in zip(case.size, case.window, strict=True))
    qkv[:, :, :, :2] = 0
    qkv[:, :, :, 2] = one_window.repeat(rows, columns, 1, 1).to(qkv)
    out = (function or case.fused)(qkv, 0 * bias, scale)
    return (out.float() * case.tokens).unflatten(3, (case.heads, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_drops_what_the_reference_drops(p, device):
    case = Case((4, 4), (0, 0), (16, 16), head_dim=16, dropout=p, cosine=False)
    mask = dropout_mask(case, device=device)
    torch.testing.assert_close(mask, dropout_mask(case, device=device, function=case.reference))
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 0.015  # five standard deviations
    # Each head, image, window, query and key has its own draw.
    halves = [x.chunk(2, dim) for dim, x in enumerate((kept,) * 4) if dim < 3]
    halves += [(kept[:, :, :, 0], kept[:, :, :, 1]), (kept[..., 1:], kept[..., :-1])]
    halves += [(kept[:, :, 1:], kept[:, :, :-1])]
    for one, other in halves:
        assert abs((one == other).float().mean() - (p**2 + (1 - p) ** 2)) < 0.03


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_follows_the_generator(device):
    case = Case(dropout=0.5)
    qkv, bias, scale = case.inputs(device=device)

    def draw():
        return ops.window_attention(qkv, bias, scale, window_size=4, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    state = torch.get_rng_state()
    ops.window_attention(qkv, bias, scale, window_size=4)  # without dropout nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
def test_dropout_of_everything(dtype, device):
    results = run(Case(dropout=1.0).fused, Case(dropout=1.0).inputs(dtype, device))
    assert all((x == 0).all() for x in results)


ISA_CASES = [
    Case((7, 7), (3, 3), (15, 9), 1, 4, 32, cosine=False),
    Case((4, 6), (2, 3), (10, 13), 2, 3, 48, dropout=0.3),
    Case((8, 8), (4, 4), (16, 12), 1, 1, 64, scale=4.6),
    Case((12, 12), (6, 6), (24, 20), 1, 2, 16),
]


def with_isa(isa: str, function: Callable[[], str]) -> str:
    """Run a function in a process whose kernels, chosen once, are those of `isa`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports take longer than the work
    with ProcessPoolExecutor(1, context, initializer=_ask_for, initargs=(isa,)) as pool:
        return pool.submit(function).result()


def _ask_for(isa: str) -> None:
    torch.set_num_threads(1)
    os.environ["SWIN_MOE_ISA"] = isa


def check_instruction_set() -> str:
    """Return the set in use; run the checks if it is the requested one."""
    used = torch.ops.swin_moe.cpu_instruction_set(True)
    if used == os.environ["SWIN_MOE_ISA"]:
        for_fp32 = {"amx_bf16": "avx512", "avx512_bf16": "avx512"}.get(used, used)
        assert torch.ops.swin_moe.cpu_instruction_set(False) == for_fp32
        for dtype in DTYPES:
            for case in ISA_CASES:
                check_parity(case, dtype)
            for cosine in (True, False):
                check_nan_places(cosine, dtype)
    return used


def error_of_the_op() -> str:
    with pytest.raises(RuntimeError) as error:
        Case().fused(*Case().inputs())
    return str(error.value)


@needs_library
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_parity_of_every_instruction_set(isa):
    used = with_isa(isa, check_instruction_set)
    if used != isa:
        pytest.skip(f"this processor lacks {isa}, {used} is used instead")


@needs_library
def test_an_unknown_instruction_set_is_an_error():
    message = with_isa("avx1024", error_of_the_op)
    assert "SWIN_MOE_ISA must be amx_bf16, avx512_bf16, avx512, avx2 or generic" in message
