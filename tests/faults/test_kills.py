"""``kill -9`` of any rank at any moment: the launcher restarts and nothing committed is lost.

``make test`` kills a few times, ``make test-all`` a hundred.
"""

import json
import random
import time

import psutil
import pytest
import torch

from swin_moe.checkpoint import CheckpointError, Reader, list_checkpoints, verify
from tests.faults import test_signals
from tests.faults.test_signals import start, steps_done
from tests.parallel import PATIENCE, ranks, train

# A save is nearly always under way.
EVERY = 2
RECIPE = ["precision.dtype=fp32", "zero.stage=1", "log.every_steps=2", "data.batch_size=8",
          "schedule.epochs=4", f"checkpoint.every_steps={EVERY}",
          "checkpoint.keep_last=2"]  # fmt: skip


def kill_at_random(process, folder, kills, generator):
    """Kill a rank some time after training went on; return the lost steps after each kill."""
    lost = []
    before = steps_done(folder)
    while len(lost) < kills:
        while steps_done(folder) <= before:  # until it makes new steps
            assert process.poll() is None, f"ended by itself after {len(lost)} kills"
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.4))
        workers = ranks(process.pid)
        if len(workers) < 2:
            continue
        kept = committed(folder)
        workers[generator.randrange(2)].kill()
        psutil.wait_procs(workers, timeout=PATIENCE)
        now = committed(folder)
        assert now >= kept, "a committed checkpoint is gone"
        before = steps_done(folder)
        lost.append(before - now)
        # The records of the lost steps are gone when the restart is logged.
        restart = f"after a failure ({len(lost)} of "
        deadline = time.monotonic() + PATIENCE
        while restart not in (folder / "logs/rank-0.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = now
    return lost


def committed(folder):
    """Return the step of the newest checkpoint, which must be whole."""
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            verify(path)
        except (CheckpointError, FileNotFoundError):
            if path.exists():  # otherwise it was pruned meanwhile
                raise
            continue
        return json.loads((path / "state.json").read_text())["step"]
    return 0


def check(tmp_path, monkeypatch, kills, steps):
    recipe = [*RECIPE, f"train.max_steps={steps}"]
    done = train(tmp_path / "undisturbed", *recipe, processes=2)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(test_signals, "RECIPE", recipe)
    folder = tmp_path / "killed"
    process = start(folder, 2, "--max-restarts", str(kills))
    try:
        lost = kill_at_random(process, folder, kills, random.Random(0))
        printed, errors = process.communicate(timeout=600)
    finally:
        process.terminate()
    assert process.returncode == 0, errors
    assert f"started again by the launcher after a failure ({kills} of {kills})" in printed
    print(f"{kills} kills, steps lost: {lost}")
    assert max(lost) <= 3 * EVERY
    ends = [tmp_path / run / "checkpoints/last" for run in ("killed", "undisturbed")]
    mine, theirs = map(Reader, ends)
    assert mine.state["position"] == theirs.state["position"]
    for name, entry in theirs.entries.items():
        for kind in entry.kinds:
            assert torch.equal(mine.tensor(name, kind), theirs.tensor(name, kind)), name


def test_a_few_kills_change_nothing(tmp_path, monkeypatch):
    """Half a minute: an undisturbed training, and the same with three restarts."""
    check(tmp_path, monkeypatch, kills=3, steps=60)


@pytest.mark.long
def test_a_hundred_kills_change_nothing(tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, kills=100, steps=1200)
