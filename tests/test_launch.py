"""The launchers quote every argument, print what they would run, and refuse what makes no sense."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NASTY = ["a b.yaml", "train.output=$(touch pwned)", "model.depths=[1, 2]", "x=;`id`'\""]


def run(script, *arguments, **env):
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHON": "py thon", **env},
    )  # fmt: skip


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# nodes\nnode-0 slots=8\nnode-1.example slots=8")
    return str(path)


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("local.sh", ["--processes", "3"], ["--standalone", "--nproc-per-node", "3"]),
        ("torchrun.sh", ["--nodes", "4", "--node-rank", "3", "--master", "node-0:2345"],
         ["--nnodes", "4", "--node-rank", "3", "--master-addr", "node-0", "--master-port", "2345"]),
        ("slurm.sbatch", [], ["srun", "--rdzv-backend", "c10d"]),
    ],
)  # fmt: skip
def test_dry_run_prints_the_quoted_command(script, options, expected):
    arguments = (
        ["--dry-run", *NASTY] if script == "slurm.sbatch" else [*options, "--dry-run", *NASTY]
    )
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[-len(NASTY) - 1 :] == ["train", *NASTY]
    assert "py thon" in command
    for word in expected:
        assert word in command
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", [], "no CONFIG given"),
        ("local.sh", ["--processes", "two", "c.yaml"], "--processes two: expected"),
        ("local.sh", ["--proceses", "2"], "unknown option --proceses"),
        ("torchrun.sh", ["c.yaml"], "--nodes '': expected"),
        ("torchrun.sh", ["--nodes", "2", "--node-rank", "2", "--master", "a", "c.yaml"], "0 to 1"),
        ("torchrun.sh", ["--nodes", "2", "--node-rank", "0", "--master", "a b", "c.yaml"],
         "--master 'a b'"),
        ("slurm.sbatch", [], "no CONFIG given"),
        ("deepspeed.sh", ["c.yaml"], "--hostfile FILE is missing"),
        ("deepspeed.sh", ["--hostfile", "nowhere", "c.yaml"], "no such file"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_deepspeed_lets_no_shell_character_through(hostfile):
    safe = ["configs/a.yaml", "model.depths=[2,2]", "optimizer.base_lr=1e-3"]
    done = run("deepspeed.sh", "--hostfile", hostfile, "--dry-run", *safe)
    command = shlex.split(done.stdout)
    assert command[-len(safe) - 3 :] == ["--no_local_rank", "swin_moe", "train", *safe]
    for argument in NASTY:
        done = run("deepspeed.sh", "--hostfile", hostfile, "--dry-run", "c.yaml", argument)
        assert done.returncode == 2
        assert "would meet a shell" in done.stderr


def test_hostfile_lines_never_reach_a_shell(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("node-0 slots=8\nnode-1;touch${IFS}pwned slots=8\n")
    done = run("deepspeed.sh", "--hostfile", str(path), "--dry-run", "c.yaml")
    assert done.returncode == 2
    assert f"{path}:2: expected 'HOST slots=GPUS'" in done.stderr


def test_slurm_takes_the_first_host_and_a_port_of_the_job(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node-7\necho node-8\n")
    scontrol.chmod(0o755)
    done = run(
        "slurm.sbatch", "--dry-run", "c.yaml", SLURM_JOB_ID="20003", SLURM_NNODES="2",
        SLURM_JOB_NODELIST="node-[7-8]", SLURM_SUBMIT_DIR=str(ROOT),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    command = shlex.split(done.stdout)
    assert command[command.index("--rdzv-endpoint") + 1] == "node-7:20003"
    assert command[command.index("--nnodes") + 1] == "2"


def torchrun(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "swin_moe.torchrun", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, script],
        capture_output=True, text=True, check=False, timeout=120, cwd=ROOT,
    )  # fmt: skip


def test_torchrun_adds_no_traceback_and_keeps_the_exit_code(tmp_path):
    done = torchrun(tmp_path, "import sys; sys.exit(7)")
    assert done.returncode == 7
    assert done.stderr == ""


def test_torchrun_names_the_rank_that_was_killed(tmp_path):
    code = "import os, time\ntime.sleep(30 * (os.environ['RANK'] == '0'))\nos.kill(os.getpid(), 9)"
    done = torchrun(tmp_path, code)
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == "swin-moe: error: rank 1 was killed by SIGKILL\n"


def test_deepspeed_starts_our_program_with_our_arguments(tmp_path):
    """Its runner on this machine alone, which needs no ssh, with the options of deepspeed.sh."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(tmp_path / "no"),
    ]
    options = ["--num_gpus", "2", "--module", "--no_local_rank", "swin_moe", "train"]
    done = subprocess.run(
        [*command, *options, "no such.yaml", "x=$(id)"],
        capture_output=True, text=True, check=False, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "swin-moe: error: no such.yaml: cannot read the config file" in done.stderr
