"""AdamW with bf16 moments: the reference against fp64, and every kernel equal to it bit for bit."""

import os

import pytest
import torch
from torch import Tensor

from swin_moe import ops
from swin_moe.ops import AdamwFactors, adamw
from swin_moe.ops.dropout import _GOLDEN, _mix
from tests.ops import adamw_cases as cases
from tests.ops import devices
from tests.ops.test_window_attention_values import with_isa

needs_library = devices.needs_library("adamw_")
DEVICES = devices.devices("adamw_")


def test_one_update_is_adamw_in_fp64_with_moments_between_their_neighbours():
    weights, gradient, pairs = cases.inputs(1000, torch.float32)
    first, second = cases.moments(pairs)
    g, m, v = gradient.double(), first.double(), second.double()
    (lr, wd, eps), (beta1, beta2) = (
        (cases.RATES[k] for k in ("lr", "weight_decay", "eps")),
        (cases.RATES["betas"]),
    )
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    step = cases.FACTORS.step
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    expected = weights.double() * (1 - lr * wd) - lr * m / (1 - beta1**step) / denominator
    ops.adamw_reference_(weights, gradient, pairs, cases.FACTORS)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)
    for found, exact in zip(cases.moments(pairs), (m, v), strict=True):
        low, high = cases.neighbours(exact.float())
        assert ((found == low) | (found == high)).all()
        assert (found == low).any()
        assert (found == high).any()


def test_the_random_bits_are_the_hash_of_dropout():
    step, start = 2**33 + 17, 3 * 2**32 + 2**16
    low, high = step & 0xFFFFFFFF, step >> 32
    key = _mix(_mix(torch.tensor(3 ^ low)) ^ high)
    column = torch.arange(2**16, 2**16 + 500) * _GOLDEN
    found = adamw.random_bits(step, start, 500, torch.device("cpu"))
    assert torch.equal(found.long() & 0xFFFFFFFF, _mix((key + column) & 0xFFFFFFFF))


def test_both_halves_of_the_random_bits_are_uniform_and_independent():
    bits = torch.stack([adamw.random_bits(t, 0, 4096, torch.device("cpu")) for t in range(1, 257)])
    high, low = (bits >> 16 & 0xFFFF) / 65536, (bits & 0xFFFF) / 65536
    for numbers in (high, low):
        counts = torch.histc(numbers, 64, 0, 1)
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi2 < 120  # 63 ± 11
    rows = [high.flatten(), low.flatten(), high.roll(1, 0).flatten(), high.roll(1, 1).flatten()]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(4)
    assert correlation.abs().max() < 0.005  # σ = 0.001


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_is_unbiased(device):
    """The mean over many updates is the exact moment, which no update changes."""
    value, updates, size = 1 + 2**-7 / 3, 400, 512
    gradient = torch.full((size,), value, device=device)
    sums = torch.zeros(2, size, dtype=torch.float64, device=device)
    for step in range(1, updates + 1):
        pairs = torch.zeros(size, device=device)
        still = AdamwFactors(step, 1.0, 1.0, 0.0, 1 / value, 0.0, 1.0)  # m = g, v = g
        ops.adamw_(torch.zeros(size, device=device), gradient, pairs, still)
        sums += torch.stack(cases.moments(pairs)).double()
    error = sums / updates - value
    sigma = 2**-7 * (2 / 9) ** 0.5  # of one rounding that goes up once in three times
    assert error.mean(1).abs().max() < 5 * sigma / (updates * size) ** 0.5
    assert error.abs().max() < 6 * sigma / updates**0.5


@needs_library
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", adamw.GRADIENT_DTYPES, ids=str)
def test_kernels_equal_the_reference_to_the_bit(device, dtype):
    cases.check_all(dtype, device)


def check_instruction_set() -> str:
    used = torch.ops.swin_moe.cpu_instruction_set(False)
    if used == os.environ["SWIN_MOE_ISA"]:
        for dtype in adamw.GRADIENT_DTYPES:
            cases.check_all(dtype, "cpu")
    return used


@needs_library
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa):
    used = with_isa(isa, check_instruction_set)
    if used != isa:
        pytest.skip(f"this processor lacks {isa}, {used} is used instead")


def error_of_the_op() -> str:
    with pytest.raises(RuntimeError) as error:
        ops.adamw_(*cases.inputs(8, torch.float32), cases.FACTORS)
    return str(error.value)


@needs_library
def test_an_unknown_instruction_set_is_an_error():
    assert "SWIN_MOE_ISA must be" in with_isa("avx1024", error_of_the_op)


@needs_library
@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_may_be_strided_and_threads_change_nothing(device):
    weights, gradient, pairs = (t.to(device) for t in cases.inputs(600 * 500, torch.float32))
    shaped = weights.view(600, 500), gradient.view(500, 600).t(), pairs.view(600, 500)
    expected = cases.reference(weights, shaped[1].contiguous().view(-1), pairs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ops.adamw_(*shaped, cases.FACTORS)
    finally:
        torch.set_num_threads(threads)
    cases.compare((weights, pairs), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reference", [False, True])
def test_numbers_that_are_none_do_what_they_do_in_torch(monkeypatch, device, reference):
    if reference:
        monkeypatch.setattr(ops.choice, "_wanted", False)
    values = [torch.nan, torch.inf, -torch.inf, 3e38, -1e25, 0.0, 1.0]
    gradient = torch.tensor(values, device=device)
    ours, pairs = torch.ones(7, device=device), torch.zeros(7, device=device)
    theirs = torch.nn.Parameter(torch.ones(7, device=device))
    optimizer = torch.optim.AdamW([theirs], **cases.RATES)
    for step in (1, 2, 3):
        ops.adamw_(ours, gradient, pairs, AdamwFactors.of(step, **cases.RATES))
        theirs.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=3e-4, equal_nan=True)
        for found, kind in zip(cases.moments(pairs), ("exp_avg", "exp_avg_sq"), strict=True):
            exact = optimizer.state[theirs][kind]
            torch.testing.assert_close(found, exact, rtol=2**-6, atol=0, equal_nan=True)
        gradient = torch.where(gradient.isfinite(), gradient, 1.0) if step == 2 else gradient


def test_a_nan_of_any_bits_stays_one():
    """A GPU's has all bits set, to which nothing can be added."""
    for bits in (0x7FFFFFFF, -1, 0x7FC00000, -0x400000, 0x7F800001):
        gradient = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        for update in (ops.adamw_, ops.adamw_reference_):
            pairs = torch.zeros(1)
            update(torch.ones(1), gradient, pairs, cases.FACTORS)
            assert pairs.view(torch.int32).item() == 0x7FC07FC0


@pytest.mark.parametrize("dtype", adamw.GRADIENT_DTYPES, ids=str)
def test_opcheck(dtype):
    arguments = (*cases.inputs(40, dtype), *cases.FACTORS)
    torch.library.opcheck(torch.ops.swin_moe.adamw_, arguments)


@pytest.mark.parametrize("reference", [False, True])
def test_autograd_notices_the_change(monkeypatch, reference):
    if reference:
        monkeypatch.setattr(ops.choice, "_wanted", False)
    weights, gradient, pairs = cases.inputs(8, torch.float32)
    weights.requires_grad_()
    loss = weights.square().sum()
    ops.adamw_(weights, gradient, pairs, cases.FACTORS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_arguments_that_do_not_fit_are_errors():
    w, g, p = (t.view(2, 4) for t in cases.inputs(8, torch.float32))

    def refused(message: str, *tensors: Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            ops.adamw_(*tensors, cases.FACTORS)

    refused("gradient must be float32 or bfloat16", w, g.half(), p)
    refused("weights must be float32 and contiguous", w.double(), g, p)
    refused("pairs must be float32 and contiguous", w, g, p.view(4, 2).t())
    refused(r"weights have shape \(2, 4\), gradient \(8,\)", w, g.view(8), p)
    assert ops.status()["adamw_"]


@needs_library
def test_the_kernel_checks_what_it_gets():
    w, g, p = cases.inputs(8, torch.float32)

    def refused(message: str, *tensors: Tensor) -> None:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.swin_moe.adamw_(*tensors, *cases.FACTORS)

    refused("weights have 8 elements, gradient 7", w, g[:7], p)
    refused("contiguous and float32", w, g, p.double())
    refused("contiguous and float32", w[::2], g[:4], p[:4])
    refused("no kernel for dtype", w, g.half(), p)
