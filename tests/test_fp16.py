"""A training in fp16: its loss scale, the faults that it is not, and a resume."""

import itertools
import json

import pytest

from swin_moe.reporting.metric_log import read_metrics
from swin_moe.training import loss_scale
from swin_moe.training.loss_scale import LossScale
from swin_moe.training.progress import Position
from tests.parallel import MICRO, SMALL, one_error, start

RECIPE = ["precision.dtype=fp16", "log.every_steps=1", "optimizer.base_lr=1e-3",
          "train.max_steps=12", "faults.nonfinite=stop"]  # fmt: skip
HIGH = {"INITIAL": 2.0**28, "WINDOW": 2}  # it must fall before the first update, and grows soon


def run(folder, processes, *overrides, scale=HIGH):
    folder.mkdir(exist_ok=True)
    arguments = ["train", str(MICRO), *SMALL, *RECIPE, f"train.output={folder / 'run'}", *overrides]
    (folder / "spec.json").write_text(json.dumps({"loss_scale": scale, "arguments": arguments}))
    return start("tests.workers", "fp16_run", str(folder), processes=processes).finish()


def records(folder):
    keys = ("step", "train/loss", "train/grad_norm", "train/loss_scale", "train/lr")
    return [[r[k] for k in keys] for r in read_metrics(folder / "run") if "train/loss" in r]


def state(folder):
    return json.loads((folder / "run/checkpoints/last/state.json").read_text())


def test_the_scale_doubles_halves_and_ends_at_its_least(monkeypatch):
    monkeypatch.setattr(loss_scale, "WINDOW", 2)
    scale = LossScale()
    seen = []
    for made in (True, True, True, False, True, True):
        scale.count() if made else scale.lower()
        seen.append((scale.value / loss_scale.INITIAL, scale.made))
    assert seen == [(1, 1), (2, 0), (2, 1), (1, 0), (1, 1), (2, 0)]
    other = LossScale()
    other.load(json.loads(json.dumps(scale.state())))
    assert other.state() == scale.state()
    scale.value = 1.5
    assert scale.lower()
    assert scale.value == 1.0
    assert not scale.lower()


def test_a_position_of_an_earlier_version_has_no_overflows():
    former = Position(step=9, skipped=2).state()
    del former["overflows"]
    assert Position.of(former).made == 7
    assert Position(step=9, skipped=2, overflows=3).made == 4


@pytest.mark.parametrize(("first", "then", "stage"), [(1, 1, 0), (2, 1, 2)])
def test_overflows_are_no_faults_and_a_resume_goes_on_exactly(tmp_path, first, then, stage):
    way = [f"zero.stage={stage}", "data.global_batch=100"]
    through, parts = tmp_path / "through", tmp_path / "parts"
    done = run(through, first, *way)
    assert done.returncode == 0, done.stderr
    assert "non-finite" not in done.stdout + done.stderr
    position = state(through)["position"]
    scales = [record[3] for record in records(through)]
    assert scales[0] == HIGH["INITIAL"] / 2  # the first update overflowed
    assert any(a < b for a, b in itertools.pairwise(scales))  # and later ones made it grow
    assert 0 < position["overflows"] < 12
    assert position["skipped"] == 0
    made = [a for a, b in zip(scales[1:], scales, strict=False) if a >= b]
    assert len(made) == 12 - position["overflows"]
    for count, length in ((first, 10), (then, 12)):
        done = run(parts, count, *way, f"train.max_steps={length}")
        assert done.returncode == 0, done.stderr
    exact = first == then
    for mine, theirs in zip(records(parts), records(through), strict=True):
        assert mine == theirs if exact else mine[3] == theirs[3]
    assert state(parts)["loss_scale"] == state(through)["loss_scale"]
    assert state(parts)["position"]["overflows"] == position["overflows"]


def test_an_overflow_at_the_least_scale_is_a_fault(tmp_path):
    done = run(tmp_path, 1, scale={"INITIAL": 2.0**60, "LEAST": 2.0**59})
    assert done.returncode == 1
    assert one_error(done).startswith("non-finite gradient norm at step 2; ")
