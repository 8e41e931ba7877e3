"""A rank that hangs is found in time, the logs have the stacks, and the launcher restarts."""

import os
import signal

from swin_moe.common import ranks as ranks_of
from tests.faults import test_signals
from tests.faults.test_nonfinite import run
from tests.faults.test_signals import start, wait_for_step
from tests.parallel import ranks


def test_a_stopped_rank_is_found_and_the_run_goes_on(tmp_path, monkeypatch):
    """A minute: the limit of a hang, and the 30 seconds that torch gives a process to end."""
    limit = 15.0
    monkeypatch.setattr(test_signals, "RECIPE", [
        *test_signals.RECIPE, f"faults.hang_timeout_s={limit}", "checkpoint.every_steps=5",
    ])  # fmt: skip
    folder = tmp_path / "run"
    process = start(folder, 2, "--max-restarts", "3")
    wait_for_step(process, folder, 6)  # the checkpoint of step 5 is written, the next is far
    os.kill(ranks(process.pid)[1].pid, signal.SIGSTOP)  # it cannot report anything
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "nothing went on for 15 s while an update was made, at " in errors
    assert f"; awaited: {ranks_of.hostname()} (rank 1); WORLD_SIZE=2 and RANK=0" in errors
    assert "started again by the launcher after a failure (1 of 3)" in printed
    assert "(2 of 3)" not in printed
    assert "resumed from step-" in printed
    stacks = (folder / "logs/rank-0.log").read_text()
    assert "Current thread" in stacks or "Thread 0x" in stacks
    assert "trainer.py" in stacks


def test_every_rank_dumps_its_stack_when_one_sleeps(tmp_path):
    """The rank that hangs in Python reports its place, as do those that wait for it."""
    done = run(tmp_path, [(1, 6)], "faults.hang_timeout_s=20", how="sleep")
    assert done.returncode != 0
    for rank in (0, 1):
        who = f"swin-moe: error: rank {rank} on {ranks_of.hostname()}: "
        assert f"{who}nothing went on for 20 s while an update was made, at " in done.stderr
        assert "trainer.py" in (tmp_path / f"run/logs/rank-{rank}.log").read_text()
    assert "in sleeping" in (tmp_path / "run/logs/rank-1.log").read_text()
