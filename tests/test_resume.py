"""Any number of processes resumes the training of two, with the same result."""

import json
import signal
from types import SimpleNamespace

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


def tensors(folder, step):
    """Return the saved masters and moments by name and kind."""
    reader = Reader(folder / f"step-{step:08d}")
    for name, entry in sorted(reader.entries.items()):
        for kind in sorted(entry.kinds):
            yield f"{name} {kind}", reader.tensor(name, kind)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_all_that_was_saved_is_loaded_bit_for_bit(results, cell):
    loaded = tensors(results / f"to-{cell.name}", HALF)
    saved = tensors(results / BEGINNING._replace(dtype=cell.dtype).name, HALF)
    for (name, a), (other, b) in zip(loaded, saved, strict=True):
        assert name == other
        assert torch.equal(a, b), name


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_curve_goes_on(results, cell):
    same_ranks = cell[:4] == BEGINNING._replace(dtype=cell.dtype)[:4]
    # Another stage sums in another order, which changes bf16 results.
    rounded = cell.dtype == "bf16" and not same_ranks
    found = json.loads((results / f"to-{cell.name}" / "figures.json").read_text())
    through = json.loads((results / f"through-{cell.dtype}" / "figures.json").read_text())
    for key, values in found.items():
        expected = pytest.approx(through[key][HALF:], rel=1e-3 if rounded else 1e-6)
        assert values == expected, key
    mine = tensors(results / f"to-{cell.name}", STEPS)
    theirs = tensors(results / f"through-{cell.dtype}", STEPS)
    # The deviation of an uninterrupted training at the other stage; otherwise none.
    other = tensors(results / f"through-{cell.dtype}{'-stage-1' if rounded else ''}", STEPS)
    for (name, a), (_, b), (_, c) in zip(mine, theirs, other, strict=True):
        if same_ranks:
            assert torch.equal(a, b), name
        a, b, c = a.double(), b.double(), c.double()
        bound = 1e-5 * b.norm() + 1e-9 if not rounded else 1.5 * (c - b).norm() + 1e-3 * b.norm()
        assert (a - b).norm() <= bound, name


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


def test_further_deaths_of_workers_interrupt_nothing():
    """PyTorch's handler raises at each death, at any place in the program."""
    from swin_moe import train  # imports DeepSpeed

    def fit():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    former = signal.signal(signal.SIGCHLD, lambda *_: fit())
    closed = []
    writer = SimpleNamespace(close=lambda: closed.append(True))
    session = SimpleNamespace(checkpointer=SimpleNamespace(writer=writer))
    try:
        with pytest.raises(RuntimeError, match="is killed"):
            train.fit(session, SimpleNamespace(fit=fit))
        assert closed
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, former)
