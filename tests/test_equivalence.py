"""Two and four processes with expert parallelism train exactly what one process trains."""

import json

import pytest
import torch

from swin_moe.checkpoint import Reader, verify
from swin_moe.placement import ExpertShare
from tests.parallel import run_worker
from tests.workers.equivalence import MOE, SHARDED, STEPS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    for processes in (1, 2, 4):
        run_worker("equivalence", folder, processes)
    return folder


def read(folder):
    path = folder / f"step-{STEPS:08d}"
    verify(path)
    reader = Reader(path)
    figures = json.loads((folder / "figures.json").read_text())
    return figures, reader


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (4, 2), (4, 3)],
)
def test_equals_one_process(results, world, stage):
    same(results / f"world{world}-stage{stage}", results / "world1-stage0", MOE.num_experts)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sharded_experts_equal_one_process(results, stage):
    reference = results / "world1-sharded0"
    same(results / f"world4-sharded{stage}", reference, SHARDED.num_experts)


def same(folder, reference, num_experts):
    expected_figures, expected = read(reference)
    figures, reader = read(folder)
    assert min(figures["norm"]) > 0.2  # clipping was active
    assert figures["loss"] == pytest.approx(expected_figures["loss"], rel=1e-5)
    assert figures["norm"] == pytest.approx(expected_figures["norm"], rel=1e-5)
    names = expected.names()
    assert any(".experts." in name for name in names)
    for name in names:
        share = ExpertShare(range(num_experts)) if ".experts." in name else None
        if name.endswith("rises"):
            assert reader.tensor(name).equal(expected.tensor(name))
            assert reader.tensor(name).any()
            continue
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                reader.tensor(name, kind, share),
                expected.tensor(name, kind, share),
                rtol=2e-4, atol=2e-6, msg=lambda text, n=name, k=kind: f"{n} {k}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bf16_stays_close_to_one_process_in_fp32(results, world, stage):
    """The loss and the true gradient norm, experts of all ranks included; bf16 keeps 8 bits."""
    expected, _ = read(results / "world1-gentle")
    figures, _ = read(results / f"world{world}-stage{stage}-bf16")
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1.5e-3)
    assert figures["norm"] == pytest.approx(expected["norm"], rel=5e-3)


def test_experts_of_two_ranks_differ(results):
    _, reader = read(results / "world2-stage2")
    name = next(n for n in reader.names() if n.endswith("experts.fc1.weight"))
    weight = reader.tensor(name, share=ExpertShare(range(4)))
    assert not torch.equal(weight[0], weight[2])  # unmarked experts would have been made equal


def test_accumulation_reduces_once_per_update(tmp_path):
    run_worker("accumulation", tmp_path, 2)
    assert (tmp_path / "passed").exists()


@pytest.mark.parametrize(("processes", "cases"), [(1, 8), (2, 6)])
def test_nan_gradient_is_refused_and_changes_nothing(tmp_path, processes, cases):
    run_worker("nonfinite", tmp_path, processes)
    assert int((tmp_path / "passed").read_text()) == cases
