"""``data.global_batch``: the same images in each update, whatever the number of processes."""

from __future__ import annotations

import math

from .sections import Config


def share_global_batch(config: Config, processes: int) -> str:
    """Set batch size and micro-steps so that all processes together make the global batch.

    With ``train.gradient_accumulation_steps=auto``, ``data.batch_size`` becomes the whole share of
    a process in an update, which is cut later. Nothing changes if ``data.global_batch`` is 0.

    Returns:
        a line on what differs from the user's values, empty if nothing does.

    Raises:
        ValueError: it cannot be shared out evenly; the line says what can.
    """
    data, train = config.data, config.train
    if not data.global_batch:
        return ""
    stated, stated_steps = data.batch_size, train.gradient_accumulation_steps
    micro, steps = micro_batches(config, processes)
    notes = []
    if stated_steps == "auto" and "batch_size" in data.model_fields_set and micro != stated:
        notes.append(
            f"data.batch_size={stated} is not used with train.gradient_accumulation_steps=auto"
        )
    elif stated_steps != "auto" and micro < stated:
        notes.append(f"micro-batches of {micro}: {stated} is more than the share of a process")
    if (
        stated_steps not in ("auto", steps)
        and "gradient_accumulation_steps" in train.model_fields_set
    ):
        notes.append(f"train.gradient_accumulation_steps is {steps}, not {stated_steps}")
    data.batch_size = micro
    train.gradient_accumulation_steps = "auto" if stated_steps == "auto" else steps
    where = f"data.global_batch={data.global_batch} over {processes} processes"
    return f"{where}: {', and '.join(notes)}" if notes else ""


def micro_batches(config: Config, processes: int) -> tuple[int, int]:
    """The images of a micro-batch, and the number of micro-batches of a process.

    A micro-batch is ``data.batch_size`` images. It is a process's whole share if that is less, or
    if ``train.gradient_accumulation_steps`` is ``auto``.
    """
    total, most = config.data.global_batch, config.data.batch_size
    pairs = config.mixes_pairs
    each, rest = divmod(total, processes)
    unit = 2 if pairs else 1
    if rest or each % unit:
        even = " of pairs, which mixup and cutmix need" if pairs else ""
        start = f"start {_or(_near(total // unit, processes))} processes, or "
        step = processes * unit
        totals = sorted({max(total // step, 1) * step, (total // step + 1) * step})
        raise ValueError(
            f"data.global_batch={total} cannot be cut into {processes} equal parts{even}: "
            f"{start if total % unit == 0 else ''}set data.global_batch={_or(totals)}"
        )
    if config.train.gradient_accumulation_steps == "auto" or each <= most:
        return each, 1
    if each % most:
        fitting = [unit * size for size in _near(each // unit, most // unit)]
        raise ValueError(
            f"data.global_batch={total} over {processes} processes is {each} images each, which "
            f"data.batch_size={most} does not divide: set data.batch_size={_or(fitting)}"
        )
    return most, each // most


def micro_batch_sizes(config: Config, images: int) -> list[int]:
    """The sizes into which the images of an update can be cut, largest first."""
    sizes = [size for size in range(images, 0, -1) if images % size == 0]
    return [size for size in sizes if not (config.mixes_pairs and size % 2)]


def _near(total: int, number: int) -> list[int]:
    """The divisors of ``total`` next to a number, at most one on each side."""
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    divisors = sorted({*small, *(total // n for n in small)})
    below = [n for n in divisors if n <= number][-1:]
    return below + [n for n in divisors if n > number][:1]


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
