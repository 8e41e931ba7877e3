"""Every legal way to train equals one process in fp32; every other way is refused.

Rounding is all that may differ. In fp32 that is a few 1e-7; in bf16, Adam's first steps make much
of the rounding of small gradients.
"""

import itertools
import json
import math

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from swin_moe.checkpoint import Reader, verify
from swin_moe.common.ranks import check_world
from swin_moe.config import ZeroConfig, load_config
from swin_moe.distributed.expert_placement import ExpertShare
from tests.grid import sampled
from tests.parallel import MICRO, run_worker
from tests.workers.equivalence import STEPS, edges, legal_cells

WORLDS = (1, 2, 4)
CELLS = [cell for world in WORLDS for cell in legal_cells(world)]
SAMPLE = 12  # cells in addition to the edges, different ones each day
EXPERTS = next(cell for cell in CELLS if cell.expert_parallel == 2)
# Bound of the relative deviation of loss and gradient norm over the steps.
FIGURES = {"fp32": (1e-5, 1e-5), "bf16": (1.5e-3, 5e-3), "fp16": (5e-4, 2.5e-3)}
# Of all weights after the last step: distance to the reference over the distance that it went.
WEIGHTS = {"fp32": 1e-5, "bf16": 0.15, "fp16": 0.04}


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Train all tested cells and their references in three starts.

    Most of a minute: some fifty trainings of five steps on up to four processes.
    """
    folder = tmp_path_factory.mktemp("equivalence")
    asked = [
        item.callspec.params["cell"]
        for item in request.session.items
        if item.module is request.module and "cell" in getattr(item, "fixturenames", ())
    ]
    cells = sorted({cell for one in [*asked, EXPERTS] for cell in (one, one.reference)}, key=str)
    (folder / "cells.json").write_text(json.dumps(cells))
    for processes in WORLDS:
        run_worker("equivalence", folder, processes, timeout=900)
    if path := request.config.getoption("--matrix"):
        path.write_text(table(folder))
    return folder


def read(folder, cell):
    return json.loads((folder / cell.name / "figures.json").read_text())


def weights(folder, cell, step=STEPS):
    reader = Reader(folder / cell.name / f"step-{step:08d}")
    return {
        f"{name} {kind}": reader.tensor(name, kind)
        for name, entry in reader.entries.items()
        for kind in entry.kinds
    }


def deviation(folder, cell):
    """Return the deviations of losses, norms and weights from those of one process in fp32."""
    found, expected = read(folder, cell), read(folder, cell.reference)
    figures = [
        max(abs(a - b) / abs(b) for a, b in zip(found[key], expected[key], strict=True))
        for key in ("loss", "norm")
    ]
    mine, theirs = weights(folder, cell), weights(folder, cell.reference)
    start = weights(folder, cell.reference, 0)
    assert mine.keys() == theirs.keys() == start.keys()
    return [*figures, distance(mine, theirs) / distance(theirs, start)]


def distance(mine, theirs):
    """Return the distance between the learnt weights of two models."""
    names = [n for n, t in mine.items() if n.endswith(" weight") and t.is_floating_point()]
    return math.sqrt(sum((mine[n].double() - theirs[n].double()).square().sum() for n in names))


@pytest.mark.parametrize(
    "cell", sampled("equivalence", CELLS, SAMPLE, edges(CELLS)), ids=lambda cell: cell.name
)
def test_equals_one_process(results, cell):
    verify(results / cell.name / f"step-{STEPS:08d}")
    assert min(read(results, cell)["norm"]) > 0.2  # clipping was active
    loss, norm, apart = deviation(results, cell)
    assert loss < FIGURES[cell.dtype][0]
    assert norm < FIGURES[cell.dtype][1]
    assert apart < WEIGHTS[cell.dtype]
    if cell.dtype != "fp32":
        return
    mine, theirs = weights(results, cell), weights(results, cell.reference)
    for name, value in theirs.items():
        if ".rises " in name:
            assert mine[name].equal(value)
            assert value.any()
        else:
            torch.testing.assert_close(
                mine[name], value, rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_experts_of_two_ranks_differ(results):
    reader = Reader(results / EXPERTS.name / f"step-{STEPS:08d}")
    name = next(n for n in reader.names() if n.endswith("experts.fc1.weight"))
    weight = reader.tensor(name, share=ExpertShare(range(4)))
    assert not torch.equal(
        weight[0], weight[2]
    )  # reduction of unmarked experts would make them equal


def configure(world, expert_parallel, stage):
    load_config(MICRO, [f"parallel.expert_parallel_size={expert_parallel}", f"zero.stage={stage}"])
    check_world(world, expert_parallel)


def test_every_other_cell_is_refused():
    """One line names the keys before anything is built."""
    legal = {(cell.world, cell.expert_parallel, cell.stage) for cell in CELLS}
    refused = 0
    for world, n, stage in itertools.product(WORLDS, (1, 2, 4), range(4)):
        if (world, n, stage) in legal:
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"expert_parallel_size=\d") as error:
            configure(world, n, stage)
        assert "\n" not in str(error.value).strip()
    assert refused == 3 * 3 * 4 - len(legal)
    assert refused == 15


def test_accumulation_reduces_once_per_update(tmp_path):
    run_worker("accumulation", tmp_path, 2)
    assert (tmp_path / "passed").exists()


@pytest.mark.parametrize(("processes", "cases"), [(1, 8), (2, 6)])
def test_nan_gradient_is_refused_and_changes_nothing(tmp_path, processes, cases):
    run_worker("nonfinite", tmp_path, processes)
    assert int((tmp_path / "passed").read_text()) == cases


@pytest.mark.parametrize(("processes", "stages"), [(1, 4), (2, 3)])
def test_a_loss_scale_that_moves_changes_no_update(tmp_path, processes, stages):
    run_worker("fp16", tmp_path, processes)
    assert int((tmp_path / "passed").read_text()) == stages


@pytest.mark.nvme
def test_state_in_files_is_state_in_memory(tmp_path):
    """ZeRO-3 with NVMe offload: the same figures, saved and resumed, as with offload to memory."""
    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio's headers are not installed (apt install libaio-dev)")
    run_worker("nvme", tmp_path, 2, timeout=900)
    assert (tmp_path / "passed").exists()


def test_missing_parts_of_offload_are_reported(tmp_path, monkeypatch):
    from swin_moe.training import engine

    for override in ("zero.stage=2", "zero.nvme_path=''"):
        with pytest.raises(ValueError, match="offload_optimizer=nvme needs"):
            load_config(
                MICRO,
                ["zero.stage=3", "zero.offload_optimizer=nvme", "zero.nvme_path=/tmp", override],
            )
    zero = ZeroConfig(stage=3, offload_optimizer="nvme", nvme_path="/proc/nowhere")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: True)
    with pytest.raises(ValueError, match=r"zero\.nvme_path=/proc/nowhere: "):
        engine.prepare_nvme(zero, None)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(ValueError, match="apt install libaio-dev"):
        engine.prepare_nvme(zero, None)


def table(folder):
    """Return the matrix for ``docs/``: worst deviation of each cell."""
    lines = [
        "| processes | expert parallel | ZeRO | precision | loss | gradient norm | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, some in itertools.groupby(CELLS, lambda c: (*c[:4], c.sharded, c.offload)):
        worst = [max(values) for values in zip(*(deviation(folder, c) for c in some), strict=True)]
        world, n, stage, dtype, sharded, offload = key
        group = f"{n}, two share each expert" if sharded else f"{n}"
        if offload != "none":
            stage = f"{stage}, offload"
        figures = " | ".join(f"{value:.0e}" for value in worst)
        lines.append(f"| {world} | {group} | {stage} | {dtype} | {figures} |")
    return "\n".join(lines) + "\n"
