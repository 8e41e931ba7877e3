"""What a kernel must pass, and its time against the fallback's.

- Results and gradients differ from fp64 by rounding only, at every case of the op.
- Memory that an op allocates is full of NaN, so that nothing stays unwritten.
- Three runs agree to the bit, one of them beside a busy second stream.
- Each image of a batch gets to the bit what it gets alone. On a GPU the batch has more than 2³¹
  elements, if they fit: an index of 32 bits, or a grid that is too large, shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import choice
from ..signature import Choice

# The error that is always accepted, relative to the largest number of the tensor.
FLOOR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
ROUNDING = 4.0  # times the fallback's own error is accepted, too: terms may cancel
SLOWER = 0.8  # a busy machine measures badly, and a kernel saves memory
broken = False  # whether an error may have left this process unfit for another trial
ROUNDS, LEAST_S = 7, 0.002


class Case(NamedTuple):
    """A call of an op.

    Attributes:
        name: for messages.
        function: takes ``leaves`` and ``others``, and returns results by name; those of integers
            are compared to the bit. It draws the same random numbers in each call.
        leaves: tensors whose gradients are compared, too.
        others: further tensors. For fp64, those of the kernel's dtype are cast as well.
    """

    name: str
    function: Callable[..., dict[str, Tensor]]
    leaves: dict[str, Tensor]
    others: tuple[Any, ...] = ()


class Problem(Exception):
    """A fault of the kernel, in words that follow "the kernel"."""


def results(case: Case, cast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Run a case, in another dtype if ``cast`` is given; return results and gradients by name."""

    def to(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(cast) if cast and floating else value

    leaves = {name: to(x.detach()).requires_grad_() for name, x in case.leaves.items()}
    found = case.function(*leaves.values(), *map(to, case.others))
    roots = [x for x in found.values() if x.requires_grad]
    if roots:
        # Drawn on the device: calls are timed, and a draw on the host would take most of the time.
        device = roots[0].device
        generator = torch.Generator(device).manual_seed(2)
        weights = [torch.randn(x.shape, generator=generator, device=device).to(x) for x in roots]
        grads = torch.autograd.grad(roots, list(leaves.values()), weights)
        found |= {f"the gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def compare(case: Case) -> None:
    """Compare a case with fp64.

    Raises:
        Problem: a result differs by more than rounding.
    """
    with poisoned():
        mine = results(case)
    exact = results(case, torch.float64)
    fallback: dict[str, Tensor] | None = None
    for name, wanted in exact.items():
        if not wanted.is_floating_point():
            if not torch.equal(mine[name], wanted):
                raise Problem(f"gave another {name} ({case.name})")
            continue
        if not bool(mine[name].isfinite().all()):
            raise Problem(f"left {name} not finite ({case.name})")
        dtype = next(iter(case.leaves.values())).dtype
        found, limit = error(mine[name], wanted), FLOOR[dtype]
        if found > limit:
            fallback = fallback or _fallback(case) or exact
            limit = max(limit, ROUNDING * error(fallback[name], wanted))
        if not found <= limit:
            raise Problem(f"differed by {found:.1e} in {name}, allowed {limit:.1e} ({case.name})")


def _fallback(case: Case) -> dict[str, Tensor] | None:
    """Return the fallback's results, None if it fails, which is no fault of the kernel."""
    global broken
    try:
        with choice.assume_fused(False):
            return results(case)
    except Exception:
        broken = True
        return None


def error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest difference over the largest exact number."""
    if exact.numel() == 0:
        return 0.0
    largest = float(exact.abs().max())
    return float((actual.double() - exact).abs().max()) / max(largest, 1e-30)


def repeat(case: Case, device: str) -> None:
    """Run a case three times; during one of them, a second stream works as well.

    Raises:
        Problem: the results are not equal to the bit.
    """
    with poisoned():
        first, second = results(case), results(case)
        wait = busy(device)
        third = results(case)
        wait()
    for other in (second, third):
        for name, wanted in first.items():
            if not torch.equal(other[name], wanted):
                raise Problem(f"gave another {name} in a second run ({case.name})")


def alone(case: Case, images: int, pick: Callable[[Case, int], Case], names: list[str]) -> None:
    """Compare the first and the last image of a batch with themselves alone.

    Raises:
        Problem: they are not equal to the bit.
    """
    whole = results(case)
    for image in (0, images - 1):
        part = results(pick(case, image))
        for name in names:
            if not torch.equal(part[name], whole[name][image : image + 1]):
                raise Problem(f"gave image {image} of {images} another {name} than alone")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the memory of new tensors with NaN, and with large integers."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def busy(device: str) -> Callable[[], None]:
    """Start work on a second stream; return a function that waits for its end."""
    if device != "cuda":
        return lambda: None
    stream = torch.cuda.Stream()
    numbers = torch.rand(1 << 25, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(200):
            numbers.sin_()
    return stream.synchronize


def measure(case: Case, device: str) -> Choice:
    """Time kernel and fallback in turns, and choose."""

    def fallback() -> None:
        with choice.assume_fused(False):
            results(case)

    # The first call compiles it, on a GPU. A fallback that fails, or does not fit, is no choice.
    return against(case, fallback, device) if _fallback(case) else Choice(True)


def against(case: Case, fallback: Callable[[], None], device: str) -> Choice:
    """Time a right kernel's case and a fallback in turns, and choose."""
    results(case)
    speedup = 0.0
    for _ in range(2):  # a second time if the machine may just have been busy
        kernel_s, fallback_s = _medians((lambda: results(case), fallback), device)
        speedup = max(speedup, fallback_s / kernel_s)
        if speedup >= SLOWER:
            break
    if speedup < SLOWER:
        return Choice(True, f"its kernel takes {1 / speedup:.1f} times as long", speedup)
    return Choice(True, speedup=speedup)


def _medians(calls: tuple[Callable[[], object], ...], device: str) -> list[float]:
    """Return the median seconds of each call, over rounds in which they take turns."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, mine in zip(calls, times, strict=True):
            wait()
            began, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - began < LEAST_S:
                call()
                count += 1
            wait()
            mine.append((time.perf_counter() - began) / count)
    return [statistics.median(mine) for mine in times]
