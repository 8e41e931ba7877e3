"""What two processes began, any others finish as if nothing had happened."""

import json

import pytest
import torch

from swin_moe.checkpoint import Reader
from tests.parallel import run_worker
from tests.workers.equivalence import STEPS
from tests.workers.resume import BEGINNING, ENDS, HALF

CELLS = [cell for cells in ENDS.values() for cell in cells]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    for processes in (2, 1, 4):
        run_worker("resume", folder, processes)
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_curve_goes_on(results, cell):
    same_ranks = cell[:4] == BEGINNING._replace(dtype=cell.dtype)[:4]
    # Another stage adds up in another order; in bf16 that shows.
    figure, state = (1e-3, 2e-2) if cell.dtype == "bf16" and not same_ranks else (1e-6, 1e-5)
    found = json.loads((results / f"to-{cell.name}" / "figures.json").read_text())
    through = json.loads((results / f"through-{cell.dtype}" / "figures.json").read_text())
    for key, values in found.items():
        assert values == pytest.approx(through[key][HALF:], rel=figure), key
    ends = [results / name / f"step-{STEPS:08d}" for name in
            (f"to-{cell.name}", f"through-{cell.dtype}")]  # fmt: skip
    mine, theirs = (Reader(end) for end in ends)
    assert mine.names() == theirs.names()
    for name, entry in theirs.entries.items():
        for kind in entry.kinds:  # masters and moments
            a, b = mine.tensor(name, kind), theirs.tensor(name, kind)
            if same_ranks:
                assert torch.equal(a, b), f"{name} {kind}"
            assert (a.double() - b.double()).norm() <= state * b.double().norm() + 1e-9, name


def test_masters_are_saved_and_not_their_rounded_copies(results):
    reader = Reader(results / "through-bf16" / f"step-{STEPS:08d}")
    weight = reader.tensor("head.weight")
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_each_rank_wrote_its_part(results):
    reader = Reader(results / BEGINNING.name / f"step-{HALF:08d}")
    ranks = {run.rank for entry in reader.entries.values() for run in entry.spans}
    assert ranks == {0, 1}
    assert {n for n in reader.files if n.startswith("rank")} == {
        "rank-00000.safetensors", "rank-00001.safetensors",
    }  # fmt: skip
