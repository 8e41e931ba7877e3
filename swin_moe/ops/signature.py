"""What a trial of a kernel speaks for, and its result."""

from __future__ import annotations

from typing import NamedTuple


class Signature(NamedTuple):
    """The calls of an op that one trial speaks for.

    Attributes:
        op: its name.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: name of the kernel's dtype, such as ``"bfloat16"``.
        shape: window height, window width and head width of attention on a GPU, where they select
            the kernel's instance; otherwise empty: one trial covers all sizes.
    """

    op: str
    device: str
    dtype: str
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        sizes = " " + "×".join(map(str, self.shape)) if self.shape else ""
        return f"{self.op} {self.dtype}{sizes}"


class Choice(NamedTuple):
    """The result of a trial.

    Attributes:
        right: the kernel passed every check.
        reason: why it does not run; "" if it runs.
        speedup: the fallback's time over the kernel's; 0 = not measured.
        lasting: whether later runs on this machine may use the result.
    """

    right: bool
    reason: str = ""
    speedup: float = 0.0
    lasting: bool = True

    @property
    def fused(self) -> bool:
        """Whether the kernel runs."""
        return self.right and not self.reason

    def __str__(self) -> str:
        if not self.fused:
            return f"fallback, {self.reason}"
        return f"fused, {self.speedup:.1f}× the fallback" if self.speedup else "fused"
