"""NaN in some images of one rank is left out, reported, and survived as configured."""

import json
import re

import pytest

from swin_moe.checkpoint import Reader, list_checkpoints
from swin_moe.reporting.metric_log import read_metrics
from tests.parallel import MICRO, SMALL, one_error, start

RECIPE = ["precision.dtype=fp32", "zero.stage=1", "log.every_steps=1", "train.max_steps=12",
          "checkpoint.every_steps=4", "checkpoint.keep_last=5",
          "parallel.expert_parallel_size=2"]  # fmt: skip


def run(folder, poison, *overrides, how="nan"):
    folder.mkdir(exist_ok=True)
    arguments = ["train", str(MICRO), *SMALL, *RECIPE, f"train.output={folder / 'run'}", *overrides]
    spec = {"poison": poison, "how": how, "arguments": arguments}
    (folder / "poison.json").write_text(json.dumps(spec))
    return start("tests.workers", "poisoned", str(folder), processes=2).finish()


def last_state(folder):
    return json.loads((folder / "run/checkpoints/last/state.json").read_text())


def test_a_bad_update_is_left_out_and_reported(tmp_path):
    done = run(tmp_path, [(1, 6)], "optimizer.base_lr=1e-4")
    assert done.returncode == 0, done.stderr
    warnings = re.findall(r"warning at step \d+: non-finite .*", done.stdout)
    assert len(warnings) == 1, done.stdout
    assert re.match(
        r"warning at step 6: non-finite (loss|tokens at \S+) on rank 1; the update is skipped "
        r"\(1 in a row, skip at 10\)", warnings[0],
    )  # fmt: skip
    position = last_state(tmp_path)["position"]
    assert (position["step"], position["skipped"]) == (12, 1)
    records = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    assert [r.get("train/skipped_updates", 0) for r in records] == [0] * 5 + [1] * 7
    # Every rank lists its samples by name.
    for rank in (0, 1):
        log = (tmp_path / f"run/logs/rank-{rank}.log").read_text()
        assert len(re.search(r"samples of step 6: (.*)", log)[1].split()) == 50


def test_a_run_whose_last_update_is_bad_saves_its_weights(tmp_path):
    """The evaluation before the save shows that the weights are finite."""
    done = run(tmp_path, [(1, 12)], "optimizer.base_lr=1e-4")
    assert done.returncode == 0, done.stderr
    position = last_state(tmp_path)["position"]
    assert (position["step"], position["skipped"], position["best_step"]) == (12, 1, 12)


@pytest.mark.parametrize(("policy", "last"), [("stop", 6), ("skip", 8)])
def test_it_stops_when_it_must(tmp_path, policy, last):
    poison = [(1, update) for update in range(6, 12)]
    done = run(tmp_path, poison, f"faults.nonfinite={policy}", "faults.max_nonfinite=3")
    assert done.returncode == 1
    message = one_error(done)
    assert re.match(rf"non-finite (loss|tokens at \S+) on rank 1 at step {last};", message)
    # Nothing is saved while updates are left out.
    assert [p.name[-1] for p in list_checkpoints(tmp_path / "run/checkpoints")] == ["4"]


def test_it_goes_back_and_on_with_later_samples(tmp_path):
    poison = [(0, update) for update in (6, 7)]
    done = run(tmp_path, poison, "faults.nonfinite=rollback", "faults.max_nonfinite=2")
    assert done.returncode == 0, done.stderr
    assert "went back to step-00000004 (epoch 1, step 7)" in done.stdout
    position = last_state(tmp_path)["position"]
    # 4 of the 12 steps were made before the checkpoint, and 5 after the roll-back.
    assert (position["step"], position["skipped"], position["update"]) == (12, 3, 12)
    steps = [r["step"] for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    assert steps == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]  # the step that led back is in no curve
    reader = Reader(tmp_path / "run/checkpoints/last")
    assert all(reader.tensor(name).isfinite().all() for name in reader.names())


def test_it_goes_back_from_the_end_of_an_epoch(tmp_path):
    """The last two of the five updates of an epoch are bad."""
    done = run(
        tmp_path, [(0, 4), (0, 5)], "faults.nonfinite=rollback", "faults.max_nonfinite=2",
        "data.batch_size=1000", "checkpoint.every_steps=2", "schedule.epochs=2",
        "train.max_steps=7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "went back to step-00000002 (epoch 2, step 5)" in done.stdout
    position = last_state(tmp_path)["position"]
    assert (position["step"], position["epoch"], position["update"]) == (7, 1, 2)


def test_weights_after_a_roll_back_at_the_very_end_are_evaluated_and_saved(tmp_path):
    poison = [(0, update) for update in (11, 12)]
    done = run(tmp_path, poison, "faults.nonfinite=rollback", "faults.max_nonfinite=2")
    assert done.returncode == 0, done.stderr
    assert "went back to step-00000008 (epoch 1, step 12)" in done.stdout
    assert re.search(r"step 12  top-1 [\d.]+ %", done.stdout)
    position = last_state(tmp_path)["position"]
    assert (position["step"], position["skipped"], position["best_step"]) == (12, 4, 12)


def test_a_checkpoint_with_bad_weights_is_skipped(tmp_path):
    """It was saved after the weights went wrong and before an update showed it."""
    poison = [(0, update) for update in (9, 10)]
    done = run(tmp_path, poison, "faults.nonfinite=rollback", "faults.max_nonfinite=1")
    assert done.returncode == 0, done.stderr
    went = re.findall(r"went back to (\S+) \(epoch 1, step (\d+)\)", done.stdout)
    assert went == [("step-00000008", "9"), ("step-00000004", "10")]
    assert (tmp_path / "run/checkpoints/damaged-step-00000008").is_dir()


def test_a_missing_checkpoint_for_the_roll_back_is_reported(tmp_path):
    poison = [(0, update) for update in range(2, 12)]
    done = run(tmp_path, poison, "faults.nonfinite=rollback", "faults.max_nonfinite=1")
    assert done.returncode == 2
    assert "there is no checkpoint left to go back to" in one_error(done)


def test_a_jump_of_the_loss_is_reported_with_its_samples(tmp_path):
    """The threshold is so low that noise is a jump, after some steps to compare with."""
    done = run(tmp_path, [], "faults.spike_sigmas=0.5", "train.max_steps=60",
               "optimizer.base_lr=1e-9", "schedule.min_lr=0",
               "checkpoint.every_steps=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    jumps = re.findall(r"warning at step (\d+): the loss jumped to [\d.]+ from", done.stdout)
    assert jumps
    assert min(map(int, jumps)) > 50
    log = (tmp_path / "run/logs/rank-1.log").read_text()
    assert f"samples of step {jumps[0]}: " in log
