"""The planner's memory compared with the allocator's statistics of real training steps.

Each cell is a config that trains a few steps under DeepSpeed on one or two processes of its own
(ZeRO-3 changes torch for good). The profiler's memory events give every allocation and release from
before the model is built; buckets are made small, or they would hide everything else.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.loss import SoftTargetCrossEntropy
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import harness
from swin_moe import distributed
from swin_moe.common.hardware import Cluster
from swin_moe.config import Config, validate
from swin_moe.models import build
from swin_moe.planner.choices import Planner
from swin_moe.planner.memory import memory
from swin_moe.planner.states import spread, states
from swin_moe.training import engine
from swin_moe.training.precision import resolve_precision

BUCKET = 1_000_000  # elements
STEPS = 3
BOUND = 0.10
_V2 = {"img_size": 64, "num_classes": 10, "embed_dim": 128, "depths": [2, 4], "num_heads": [4, 8]}
_V1 = {**_V2, "family": "swin", "img_size": 56, "window_size": 7}
_MOE = {"blocks": [[], [1, 3]], "num_experts": 8}


def _cell(
    stage: int,
    dtype: str = "fp32",
    images: int = 8,
    processes: int = 1,
    model: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    expert_parallel_size: int = 1,
    steps: int = 1,
) -> tuple[dict[str, Any], int]:
    config = {
        "model": {**(model or _V2), "name": (model or _V2).get("family", "swinv2")},
        "moe": moe or {},
        "data": {"batch_size": images},
        "augment": {"mixup": 0.0, "cutmix": 0.0},
        "zero": {"stage": stage},
        "precision": {"dtype": dtype},
        "parallel": {"expert_parallel_size": expert_parallel_size},
        "train": {"gradient_accumulation_steps": steps},
    }
    return config, processes


CELLS = {
    "V2, ZeRO 0": _cell(0),
    "V2, ZeRO 0, bf16": _cell(0, "bf16"),
    "V2, ZeRO 1, 2 images": _cell(1, images=2),
    "V2, ZeRO 1, bf16": _cell(1, "bf16"),
    "V2, ZeRO 2 on 2": _cell(2, processes=2),
    "V2, ZeRO 2, bf16, recomputed": _cell(2, "bf16", model={**_V2, "use_checkpoint": True}),
    "V2, ZeRO 3 on 2": _cell(3, processes=2),
    "V2, ZeRO 3, bf16": _cell(3, "bf16"),
    "V1, ZeRO 1": _cell(1, model=_V1),
    "V1, ZeRO 0, recomputed, 16 images": _cell(0, images=16, model={**_V1, "use_checkpoint": True}),
    "MoE, ZeRO 1": _cell(1, moe=_MOE),
    "MoE, ZeRO 2, bf16, recomputed": _cell(
        2, "bf16", moe=_MOE, model={**_V2, "use_checkpoint": True}
    ),
    "MoE, EP 2, ZeRO 1": _cell(1, moe=_MOE, processes=2, expert_parallel_size=2),
    "MoE, EP 2, ZeRO 2, bf16": _cell(2, "bf16", moe=_MOE, processes=2, expert_parallel_size=2),
    "V2, ZeRO 1, 2 × 4 images": _cell(1, images=4, steps=2),
}
# One process each: with more, gloo's threads release tensors at arbitrary times.
QUICK = ["V2, ZeRO 1, bf16", "V1, ZeRO 0, recomputed, 16 images", "MoE, ZeRO 2, bf16, recomputed"]


# --------------------------------------------------------------------------------------------
# Measured


def measure(raw: dict[str, Any], processes: int) -> dict[str, float]:
    """Return the bytes by kind of rank 0, measured in other processes.

    Of several processes the least of three trainings: gloo's threads let go of tensors where the
    profiler does not look, which can only add to the account.
    """
    runs = [
        _forked(lambda rank, folder: _trained(raw, rank, processes, folder), processes)
        for _ in range(1 if processes == 1 else 3)
    ]
    return {kind: min(run[kind] for run in runs) for kind in runs[0]}


def _forked(work: Callable[[int, str], Any], processes: int = 1) -> Any:
    """Return the result of ``work(rank, folder)`` in rank 0 of several forked processes.

    What takes seconds to import is there already; and autograd's threads, which no fork survives,
    are never made here.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(work, rank, folder) for rank in range(processes)]
        failed = [os.waitpid(child, 0)[1] for child in children]
        if any(failed):
            raise RuntimeError(f"a process of the cell failed: {failed}")
        return json.loads((Path(folder) / "result-0.json").read_text())


def _fork(work: Callable[[int, str], Any], rank: int, folder: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    torch.set_num_threads(1)  # before autograd's threads start, which would race for torch's pool
    try:
        result = work(rank, folder)
        (Path(folder) / f"result-{rank}.json").write_text(json.dumps(result))
        distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _trained(raw: dict[str, Any], rank: int, size: int, folder: str) -> dict[str, float]:
    if size > 1:
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({key: str(value) for key, value in env.items()})
    return _train(validate(raw))


def _train(config: Config) -> dict[str, float]:
    engine.BUCKET = BUCKET
    _wait_for_releases()
    world = distributed.init(config.parallel.expert_parallel_size)
    images = torch.randn(config.data.batch_size, 3, *config.model.image_sides)
    targets = torch.randn(config.data.batch_size, config.model.num_classes).softmax(1)
    loss_function, steps = SoftTargetCrossEntropy(), config.train.micro_steps
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _mark("start")
        model = build(config.model, config.moe, world.expert)
        _mark("built")
        trained = engine.Engine(
            model,
            world,
            optimizer=config.optimizer,
            zero=config.zero,
            dtype=resolve_precision(config.precision, world.device),
            micro_batch=config.data.batch_size,
            gradient_accumulation_steps=steps,
        )
        trained.train()
        for step in range(STEPS):
            for micro in range(steps):
                _mark(f"pass {step} {micro}")
                logits, aux_loss, _ = trained.forward({"images": images})
                loss = loss_function(logits, targets)
                loss = loss if aux_loss is None else loss + aux_loss
                trained.backward(loss)
                del logits, aux_loss, loss
                _mark(f"update {step} {micro}")
                trained.step()
        _mark("end")
    return _by_kind(_account(profiler), steps)


def _mark(name: str) -> None:
    with record_function(f"mark {name}"):
        pass


def _wait_for_releases() -> None:
    """Wait after each collective: gloo holds tensors, and the profiler misses their release."""

    def patient(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            work = collective(*args, **kwargs)
            if hasattr(work, "wait"):
                work.wait()
            time.sleep(0.03)
            return work

        return call

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
                 "reduce_scatter", "all_to_all_single", "broadcast"):  # fmt: skip
        setattr(dist, name, patient(getattr(dist, name)))


def _account(profiler: Any) -> dict[str, tuple[int, int]]:
    """Return the bytes at each mark, and the peak until the next one."""
    events: list[tuple[int, int, Any]] = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            events.append((event.start_ns(), 1, event.nbytes()))
        elif event.name().startswith("mark "):
            events.append((event.start_ns(), 0, event.name().removeprefix("mark ")))
    live, mark, account = 0, "", {}
    for _, is_memory, what in sorted(events, key=lambda event: event[:2]):
        if is_memory:
            live += what
            if mark:
                account[mark] = (account[mark][0], max(account[mark][1], live))
        else:
            mark = what
            account[mark] = (live, live)
    return account


def _by_kind(account: dict[str, tuple[int, int]], steps: int) -> dict[str, float]:
    step, last = STEPS - 1, steps - 1
    held = account[f"pass {step} 0"][0]
    passes = max(account[f"pass {step} {micro}"][1] for micro in range(steps))
    update = account[f"update {step} {last}"]
    return {
        "weights and gradients": account["built"][0] + update[0] - held,
        "held": held,
        "passes": passes - held,
        "peak": max(passes, update[1]),
    }


# --------------------------------------------------------------------------------------------
# Predicted


def predict(raw: dict[str, Any], processes: int) -> dict[str, float]:
    """Return the planner's bytes of the same kinds, for processes of this machine."""
    config = validate(raw)
    planner = Planner(config, Cluster("cpu", 1, processes), fused=True)
    choice = planner.configured()
    sizes = spread(
        planner.groups(choice.expert_parallel_size), processes, choice.expert_parallel_size
    )
    held = states(
        sizes, stage=choice.stage, half=planner.half, offload="none", accelerator=False,
        accumulates=choice.accumulation > 1, minimum_bucket=BUCKET,
    )  # fmt: skip
    width = 2 if planner.half and choice.stage else 4
    taken = memory(
        planner.traced(choice), held, images=choice.images,
        accumulates=choice.accumulation > 1, gradient_width=width,
    )  # fmt: skip
    always = held.gradients + held.between if choice.stage == 3 else 0
    between = held.weights + held.optimizer + always
    gradients = 0 if choice.stage == 3 else held.gradients
    return {
        "weights and gradients": 4 * sum(g.elements for g in sizes) + gradients,
        "held": between,
        "passes": taken.passes - always,
        "peak": taken.total,
    }


def compare(names: list[str]) -> list[dict[str, Any]]:
    """Return the cells: bytes by kind, measured and predicted, and the relative errors."""
    cells = []
    for name in names:
        raw, processes = CELLS[name]
        measured = measure(raw, processes)
        predicted = _forked(lambda rank, folder: predict(*CELLS[name]))  # noqa: B023
        off = {kind: predicted[kind] / measured[kind] - 1 for kind in measured}
        cell = harness.figure(name, "bytes", predicted["peak"], mode="peak", off=off)
        cells.append({**cell, "measured": measured, "predicted": predicted})
        line = ", ".join(
            f"{k} {measured[k] / 2**20:.1f} / {predicted[k] / 2**20:.1f} ({100 * off[k]:+.1f} %)"
            for k in measured
        )
        print(f"{name}: {line}", flush=True)
    return cells


def main() -> None:
    options = harness.arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    cells = compare(QUICK if options.quick else list(CELLS))
    kinds = list(cells[0]["measured"])
    rows = [
        [cell["name"], *(f"{cell['measured'][k] / 2**20:.1f} / {cell['predicted'][k] / 2**20:.1f}"
                         for k in kinds), f"{100 * max(map(abs, cell['off'].values())):.1f} %"]
        for cell in cells
    ]  # fmt: skip
    harness.report("MiB, measured / predicted", ["cell", *kinds, "off by at most"], rows)
    harness.write_json(options.json, cells, bound=BOUND)
    if any(abs(off) > BOUND for cell in cells for off in cell["off"].values()):
        raise SystemExit(f"a prediction is off by more than {100 * BOUND:.0f} %")


if __name__ == "__main__":
    main()
