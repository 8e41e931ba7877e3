"""Processes that are alike begin; the others are refused in one line that names the host."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from swin_moe import distributed, ops
from swin_moe.config import load_config
from swin_moe.distributed import meeting
from swin_moe.preflight import Agreement, links
from swin_moe.preflight.agreement import compare, named
from swin_moe.preflight.facts import Facts, collect
from swin_moe.preflight.shared import check_folder
from swin_moe.preflight.start import check
from tests.parallel import MICRO, one_error, run_worker, swin_moe
from tests.saving import ALONE


def found(tmp_path, case):
    """Return the results of two processes, which must be the same, and leave nothing behind."""
    folder = tmp_path / case
    folder.mkdir()
    run_worker("preflight", folder, 2)
    first, second = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert not (folder / "runs").exists()
    return first


def test_processes_that_agree(tmp_path):
    result = found(tmp_path, "alike")
    assert result["problems"] == []
    assert [timing["name"] for timing in result["links"]["timings"]] == ["all-reduce", "all-to-all"]
    assert all(timing["bandwidth"] > 0 for timing in result["links"]["timings"])
    assert links.dispatched_elements(load_config(MICRO)) > 0
    assert abs(result["links"]["skew"][1]) < 0.5
    assert not [line for line in result["warnings"] if "clock" in line]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("torch", "node-1: torch 2.14.1, but node-0 has {torch}: install requirements/lock.txt"),
        ("config", "node-1: optimizer.base_lr=0.5, but node-0 has "),
        ("expert_parallel", "node-1: parallel.expert_parallel_size=1, but node-0 has 2: start "),
        ("folder", "elsewhere is not the folder in which rank 0 writes: train.output must"),
        ("late", "1 of 2 processes have not come"),
    ],
)  # fmt: skip
def test_processes_that_differ(tmp_path, case, expected):
    folder = tmp_path / case
    folder.mkdir()
    run_worker("preflight", folder, 2)
    error = json.loads((folder / "found-0.json").read_text())["error"]
    assert expected.format(torch=torch.__version__) in error
    assert "\n" not in error
    assert ("rank 1" if case == "late" else "node-1") in error
    if case != "late":
        assert json.loads((folder / "found-1.json").read_text())["error"] == error


def test_clocks_and_drivers_are_only_warnings(tmp_path):
    warnings = found(tmp_path, "clock")["warnings"]
    assert [line for line in warnings if line.startswith("node-1: its clock is 7.")]
    warnings = found(tmp_path, "driver")["warnings"]
    assert "node-1: driver 550.1, but node-0 has none" in warnings


def test_facts_are_real(tmp_path):
    facts = collect(load_config(MICRO, [f"train.output={tmp_path}/run"]))
    assert facts.host == socket.gethostname()
    assert facts.versions["torch"] == torch.__version__
    assert facts.versions["compiled ops"] == (ops.library_digest() or "not built")
    assert facts.disk == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert facts.memory > 0
    other = collect(load_config(MICRO, [f"train.output={tmp_path}/run", "train.seed=1"]))
    assert other.versions["config"] != facts.versions["config"]
    assert other.versions["source"] == facts.versions["source"]


def facts_of(*hosts, gpu="", **more):
    return [
        Facts(host, 0, {"torch": "2.0", "timm": "1", "commit": "a", **more}, gpu and f"{gpu}{i}",
              10**10, 10**10, 10**10, 10**10)
        for i, host in enumerate(hosts)
    ]  # fmt: skip


def test_the_odd_one_out_is_named_not_the_first():
    facts = facts_of("a", "b", "b", "c")
    facts[0].versions["torch"] = "1.9"
    problems, _ = compare(facts, [{}] * 4)
    assert problems[0].startswith("a: torch 1.9, but b, c has 2.0")
    assert named(facts, [1]) == "b (rank 1)"
    assert named(facts, [1, 2]) == "b"


def test_two_processes_on_one_gpu_are_refused():
    facts = facts_of("a", "a", gpu="GPU-")
    assert compare(facts, [{}] * 2)[0] == []
    facts = [facts[0], facts[0]]
    assert "2 processes share one GPU" in compare(facts, [{}] * 2)[0][0]


def test_a_slow_link_and_a_slow_process_are_named():
    facts = facts_of("a", "b", "c", "d")
    fast = links.Links([], [0.0, 0.0, 9.0, 0.0], [0.01, 0.01, 0.01, 0.2], [1e12, 1e12, 1e11, 1e12])
    lines = links.judge(fast, facts)
    assert any("c: its clock is 9.0 s ahead of a's" in line for line in lines)
    assert any("c computes 10.0 times slower" in line for line in lines)
    assert any("the link from c to d is 20.0 times slower" in line for line in lines)
    assert len(lines) == 3


def test_an_unreachable_master_is_one_line(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # bound, and nobody listens
        with pytest.raises(
            ConnectionError, match=rf"cannot reach rank 0 at 127.0.0.1:{port} after 1 s"
        ):
            meeting.open_store("127.0.0.1", port, 1, 2, 1.0, serve=False)


def test_a_port_that_is_taken_is_one_line(capfd):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"MASTER_PORT={port} is taken"):
            meeting.open_store("127.0.0.1", port, 0, 2, 1.0, serve=True)
        with pytest.raises(ConnectionError, match="is not rank 0 of this run"):
            meeting.open_store("127.0.0.1", port, 1, 2, 1.0, serve=False)
    assert capfd.readouterr().err == ""


def test_ranks_without_a_master_are_one_line(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="rank 1 of 2: MASTER_ADDR does not say where rank 0 is"):
        distributed.connect()
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(ValueError, match="MASTER_PORT=http is not a number"):
        distributed.connect()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    config = load_config(MICRO, [f"train.output={tmp_path}/file/run"])
    lines = check_folder(config, ALONE, facts_of("a"))
    assert lines == [f"a: {tmp_path}/file cannot be written: File exists"]
    config = load_config(MICRO, [f"train.output={tmp_path}/new/er/run"])
    assert check_folder(config, ALONE, facts_of("a")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_small_disk_is_reported_in_numbers_that_are_not_0():
    def warnings(disk):
        verdict = Agreement([SimpleNamespace(disk=disk, host="a")], [], [])
        return check(load_config(MICRO), verdict, ALONE, torch.float32).warnings

    (warning,) = warnings(2.5e6)
    assert warning.startswith("a: 2.5 MB are free for train.output, but its ")
    assert " MB (checkpoint.keep_last)" in warning
    assert warnings(1e12) == []


def test_spans():
    assert meeting.spans([3]) == "rank 3"
    assert meeting.spans([0, 1, 2, 5]) == "ranks 0-2, 5"


def test_doctor_of_one_process(tmp_path):
    done = swin_moe("doctor", str(MICRO), f"train.output={tmp_path}/run", "--json",
                    str(tmp_path / "found.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fit: the process may begin" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["problems"] == []
    assert not (tmp_path / "run").exists()
    done = swin_moe("doctor", str(MICRO), "model.windw_size=3")
    assert done.returncode == 2
    assert "did you mean 'model.window_size'?" in one_error(done)


def meeting_of(size, timeout=2.0):
    return meeting.Meeting(dist.HashStore(), 0, size, "node-0:29500", timeout)


def test_a_wait_for_others_is_reported_with_the_variables(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "REPORT_AFTER", 0.0)
    monkeypatch.setattr(meeting.time, "sleep", lambda seconds: None)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TimeoutError) as error:
        meeting_of(3).exchange("versions", "mine", lambda texts: texts[0])
    waits = capsys.readouterr().err
    assert waits == (
        "swin-moe: rank 0 waits at node-0:29500 for 2 of 3 processes: never connected (ranks 1-2); "
        "SLURM_NTASKS=3 and SLURM_PROCID=0 in the environment (no srun started this process: put "
        "srun before the command, which starts them all)\n"
    )
    assert "2 of 3 processes have not come to node-0:29500 (versions): never" in str(error.value)
    assert "SLURM_NTASKS=3 and SLURM_PROCID=0" in str(error.value)


def test_ranks_hear_of_one_another_while_they_run():
    mine = meeting_of(3).pulses()
    assert mine.hear() == {}
    mine.say("4 5 6")
    assert mine.hear() == {0: "4 5 6"}
    assert mine.whose([0, 1]) == f"{socket.gethostname()} (rank 0), never connected (rank 1)"
    assert meeting.Meeting(None, 0, 1, "", 1.0).pulses() is None


def test_rank_0_reports_that_its_own_name_is_unknown(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "REPORT_AFTER", 0.0)
    with pytest.raises(ConnectionError, match=r"after 0.1 s \(MASTER_ADDR=no name: .*: set MAS"):
        meeting.open_store("no name", 1, 0, 2, 0.1, serve=True)
    assert (
        "rank 0 waits for its own name to be known (MASTER_ADDR=no name" in capsys.readouterr().err
    )
