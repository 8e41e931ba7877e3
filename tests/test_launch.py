"""The launchers quote every argument, print their command, and refuse senseless requests."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from swin_moe.config import load_plain
from swin_moe.launch import command, nodes
from tests.parallel import PATIENCE

ROOT = Path(__file__).parent.parent
NASTY = ["a b.yaml", "train.output=$(touch pwned)", "model.depths=[1, 2]", "x=;`id`'\""]


def run(script, *arguments, **env):
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
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
        ("torchrun.sh", ["--nodes", "4", "--master", "node-0:2345"],
         ["--nnodes", "4", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node-0:2345"]),
        ("torchrun.sh", ["--nodes", "2:4", "--master", "node-0", "--timeout", "60"],
         ["--nnodes", "2:4", "--rdzv-endpoint", "node-0:29500", "join_timeout=60"]),
        ("slurm.sbatch", ["--processes", "2"], ["srun", "--rdzv-backend", "c10d"]),
        ("mpi.sh", ["--hostfile", "HOSTFILE"], ["mpirun", "-n", "16", "MASTER_ADDR"]),
    ],
)  # fmt: skip
def test_dry_run_prints_the_quoted_command(script, options, expected, hostfile):
    options = [hostfile if word == "HOSTFILE" else word for word in options]
    done = run(script, *options, "--dry-run", *NASTY)
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
        ("local.sh", ["--processes", "two", "c.yaml"], "--processes 'two': expected"),
        ("local.sh", ["--proceses", "2"], "unknown option --proceses"),
        ("torchrun.sh", ["c.yaml"], "--nodes '': expected"),
        ("torchrun.sh", ["--nodes", "4:2", "--master", "a", "c.yaml"], "--nodes '4:2': expected"),
        ("torchrun.sh", ["--nodes", "2", "--master", "a b", "c.yaml"], "--master 'a b'"),
        ("torchrun.sh", ["--nodes", "2", "--master", "a:70000", "c.yaml"], "from 1 to 65535"),
        ("torchrun.sh", ["--nodes", "2", "--master", "a", "--timeout", "0", "c.yaml"],
         "--timeout '0'"),
        ("slurm.sbatch", [], "no CONFIG given"),
        ("slurm.sbatch", ["c.yaml"], "the job has no GPUs"),
        ("slurm.sbatch", ["--processes", "1", "--experiments", "nowhere", "c.yaml"],
         "--experiments nowhere: no such file"),
        ("mpi.sh", ["c.yaml"], "--hostfile FILE is missing"),
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


BAD_LINES = [
    "node-1;touch${IFS}pwned slots=8",
    "$(touch pwned) slots=8",
    "-oProxyCommand=id slots=8",
    "node-1 slots=0",
    "node-1 slots=8 max_slots=9",
    "node-1",
    "node-0 slots=4",
]


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("script", ["deepspeed.sh", "mpi.sh"])
def test_hostfile_lines_never_reach_a_shell(tmp_path, script, line):
    path = tmp_path / "hosts"
    path.write_text(f"node-0 slots=8\n{line}\n")
    done = run(script, "--hostfile", str(path), "--dry-run", "c.yaml")
    assert done.returncode == 2
    assert f"{path}:2: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("pwned").exists()
    with pytest.raises(ValueError, match=r"hosts:2: "):
        command.read_hostfile(path)


def test_an_array_task_takes_its_line_and_evaluates_nothing(tmp_path):
    file = tmp_path / "experiments"
    file.write_text("# rates\noptimizer.base_lr=1e-3\n\noptimizer.base_lr=$(id) zero.stage=1\n")
    options = ["--dry-run", "--processes", "1", "--experiments", str(file)]
    done = run("slurm.sbatch", *options, "a/b.yaml", "train.seed=1", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[-5:] == ["a/b.yaml", "train.output=runs/b/2", "train.seed=1",
                          "optimizer.base_lr=$(id)", "zero.stage=1"]  # fmt: skip
    done = run("slurm.sbatch", *options, "b.yaml", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 2
    assert "has 2 experiments, and this is array task 3" in done.stderr
    assert command.read_experiments(file)[0][1] == ["optimizer.base_lr=1e-3"]


SMALL = "parallel.expert_parallel_size=1"
RECIPE = str(ROOT / "configs/imagenet22k/swin_moe_base_32expert.yaml")


def front(engine, *overrides, config=RECIPE, **options):
    return command.Request(engine, config, list(overrides), **options)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (front("local", config="nowhere.yaml"), "nowhere.yaml: no such config file or recipe"),
        (front("local", "zero.stag=1"), "did you mean 'zero.stage'"),
        (front("local", nodes="2"), "--nodes is not for --on local"),
        (front("mpi", hostfile="h", max_restarts=1), "--max-restarts is not for --on mpi"),
        (front("torchrun", master="localhost"), "--nodes N is missing"),
        (front("torchrun", nodes="2", master="a b"), "--master 'a b': expected"),
        (front("torchrun", nodes="0", master="localhost"), "--nodes 0: expected"),
        (front("torchrun", "parallel.expert_parallel_size=8", nodes="4", gpus_per_node=3,
               master="localhost"), "does not divide the 12 processes"),
        (front("slurm", nodes="2:4", gpus_per_node=8), "--nodes 2:4: expected a number"),
        (front("slurm", nodes="2"), "--gpus-per-node M is missing"),
        (front("kubernetes", gpus_per_node=0), "--gpus-per-node 0: expected"),
        (front("local", gpus_per_node=10**9, cpu=True), "expected a number from 1 to 9999"),
        (front("local", gpus_per_node=8), "8: this machine has no GPU; add --cpu for 8 processes"),
        (front("local", "parallel.expert_parallel_size=4"), "does not divide the 2 processes"),
        (front("local", SMALL, "data.path=/no/where"), "data.path=/no/where: no such file"),
        (front("torchrun", nodes="2", master="localhost"), "--gpus-per-node M is missing"),
        (front("torchrun", nodes="2", master="localhost", cpu=True),
         "--gpus-per-node M is missing"),
        (front("deepspeed"), "--hostfile FILE is missing"),
        (front("deepspeed", hostfile="nowhere"), "--hostfile nowhere: No such file"),
    ],
)  # fmt: skip
def test_the_front_refuses_before_anything_starts(request_, message):
    with pytest.raises(ValueError, match=r".") as caught:
        command.check(request_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_processes_on_the_cpu_see_no_gpu():
    words = command.command(front("local", gpus_per_node=3, cpu=True), dry_run=True)
    assert words[:3] == ["env", f"SWIN_MOE_PYTHON={sys.executable}", "CUDA_VISIBLE_DEVICES="]
    assert words[4:-1] == ["--processes", "3", "--dry-run"]
    command.check(front("local", "data.path=fashion_mnist", gpus_per_node=8, cpu=True))


def test_data_that_is_not_on_this_machine_is_a_warning(capfd):
    assert command.launch(front("slurm", "data.path=/no/where", gpus_per_node=8), dry_run=True) == 0
    assert "data.path=/no/where is not on this machine" in capfd.readouterr().err


def test_an_editable_install_is_found_in_the_folder_of_a_clone():
    """By a line in a .pth file: setuptools' finder comes after the folder of the clone."""
    assert '"editable_wheel": {"mode": "compat"}' in (ROOT / "setup.py").read_text()


def test_the_front_compares_the_hostfile_with_nodes_and_gpus(hostfile):
    good = front("mpi", hostfile=hostfile, nodes="2", gpus_per_node=8)
    command.check(good)
    assert command.command(good)[3:5] == ["--hostfile", hostfile]
    with pytest.raises(ValueError, match="lists 2 hosts"):
        command.check(replace(good, nodes="3"))
    with pytest.raises(ValueError, match="gives 8 slots to node-0"):
        command.check(replace(good, gpus_per_node=4))


def test_the_front_sees_that_the_port_of_the_master_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        busy = front("torchrun", nodes="2", gpus_per_node=8, master=f"127.0.0.1:{port}")
        with pytest.raises(ValueError, match=f"port {port} of this machine"):
            command.check(busy)


def test_the_front_hands_slurm_an_array(tmp_path):
    file = tmp_path / "experiments"
    file.write_text("zero.stage=1\n#\nzero.stage=2\n")
    words = command.command(
        front("slurm", nodes="2", gpus_per_node=4, cpu=True, experiments=str(file))
    )
    assert words[words.index("--array") + 1] == "1-2"
    assert words[words.index("--processes") + 1] == "4"
    assert "--gpus-per-node" not in words
    file.write_text("zero.stage=1\nzero.stag=2\n")
    bad = front("slurm", gpus_per_node=4, experiments=str(file))
    with pytest.raises(ValueError, match=r"experiments:2: .*zero.stage"):
        command.check(bad)


def test_experiments_have_folders_of_their_own(tmp_path):
    file = tmp_path / "experiments"
    file.write_text("zero.stage=1\nzero.stage=2 train.output=a\n")
    options = {"gpus_per_node": 4, "experiments": str(file)}
    command.check(front("slurm", SMALL, **options))
    with pytest.raises(ValueError, match=r"experiments:2: train\.output=a is also that of line 1"):
        command.check(front("slurm", "train.output=a", **options))
    file.write_text("train.output=a\n\ntrain.output=./a\n")
    with pytest.raises(ValueError, match=r"experiments:3: train\.output=\./a is also"):
        command.check(front("slurm", **options))


def test_lines_of_windows_and_endless_files(tmp_path):
    file = tmp_path / "experiments"
    file.write_bytes(b"\xef\xbb\xbftrain.output=a\r\n\r\n# b\r\ntrain.output=c\r\n")
    assert command.read_experiments(file) == [(1, ["train.output=a"]), (4, ["train.output=c"])]
    for task, output in (("1", "a"), ("2", "c")):
        options = ["--dry-run", "--processes", "1", "--experiments", str(file), "c.yaml"]
        done = run("slurm.sbatch", *options, SLURM_ARRAY_TASK_ID=task)
        assert shlex.split(done.stdout)[-1] == f"train.output={output}"
    with pytest.raises(ValueError, match="--experiments: /dev/zero is a device, not a file"):
        command.read_experiments(Path("/dev/zero"))


def test_the_manifest_fits_the_schema_and_the_plain_file():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api")
    plain = load_plain(ROOT / "launch/kubernetes.yaml")
    made = command.train_job(front("kubernetes", "x=$(id)", nodes="4", gpus_per_node=8))
    for job in (plain, made):
        # Keys that the schema does not have would not come back.
        assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    assert made["spec"]["trainer"]["command"] == plain["spec"]["trainer"]["command"]
    assert made["spec"]["trainer"]["args"] == [RECIPE, "x=$$(id)"]
    assert made["metadata"]["name"] == "swin-moe-base-32expert"
    alone = command.train_job(front("kubernetes", gpus_per_node=2, cpu=True, doctor=True))
    assert "nvidia.com/gpu" not in alone["spec"]["trainer"]["resourcesPerNode"]["limits"]
    assert alone["spec"]["trainer"]["command"][-1] == "doctor"
    (one,), (other,) = (job["spec"]["trainer"]["env"] for job in (made, alone))
    assert one["name"] == other["name"] == "PET_RDZV_ID"
    assert one["value"] != other["value"]


def test_slurm_takes_the_first_host_and_a_port_of_the_job(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node-7\necho node-8\n")
    scontrol.chmod(0o755)
    done = run(
        "slurm.sbatch", "--dry-run", "--processes", "1", "c.yaml",
        SLURM_JOB_ID="20003", SLURM_NNODES="2", SLURM_JOB_NODELIST="node-[7-8]",
        SLURM_SUBMIT_DIR=str(ROOT), PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    command = shlex.split(done.stdout)
    assert command[command.index("--rdzv-endpoint") + 1] == "node-7:20003"
    assert command[command.index("--nnodes") + 1] == "2"
    assert "--rdzv-id" not in command  # other users could list it


def test_a_dry_run_counts_no_gpus_where_there_are_none():
    done = run("torchrun.sh", "--nodes", "2", "--master", "a", "--dry-run", "c.yaml")
    assert "--nproc-per-node gpu" in done.stdout


def waiting(participants, spare, timeout=0.0, stop=False):
    """Let a node wait at a master that has these participants."""
    state = SimpleNamespace(
        participants=[SimpleNamespace(addr=name) for name in participants],
        redundancy_list=["me"] if spare else [], complete=spare,
    )  # fmt: skip
    holder = SimpleNamespace(sync=lambda: True, state=state)
    handler = SimpleNamespace(_state_holder=holder, _this_node="me")
    here = nodes.Nodes("node-0:29500", timeout, "2", lambda: stop)
    with here.watched(handler):
        holder.sync()
    return here


def test_a_node_too_many_does_not_wait_for_ever():
    with pytest.raises(nodes.Unmet, match=r"node-0:29500 has its 2 nodes \(a, b\), and none left"):
        waiting(["b", "a"], spare=True)
    waiting(["b", "a"], spare=True, timeout=60.0)  # one of them may have been lost


def test_a_wait_names_the_nodes_that_came_and_ends_by_a_signal():
    here = waiting(["a"], spare=False)
    assert "1 of 2 nodes came to node-0:29500 within 0 s (a)" in str(here.timed_out())
    with pytest.raises(nodes.Stopped):
        waiting(["a"], spare=False, stop=True)


def test_processes_outlive_the_launcher_of_the_master():
    class Handler:
        def num_nodes_waiting(self):
            raise RendezvousConnectionError("gone")

    assert nodes.Nodes("node-0:29500", 1.0, "2", lambda: False).newcomers(Handler()) == 0


def torchrun(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [
        sys.executable,
        "-m",
        "swin_moe.launch.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*command, script],
        capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=ROOT,
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
    """Its runner on this machine needs no ssh; the options are those of deepspeed.sh."""
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
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "swin-moe: error: no such.yaml: no such config file or recipe" in done.stderr
