"""A real Slurm: munge, a controller and two node daemons on loopback, all in a temporary folder."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from swin_moe.config import load_config
from tests.cluster.tools import (
    LAUNCH,
    PATIENCE,
    ROOT,
    environment,
    free_ports,
    last_step,
    need,
    run_of,
    starts,
    until,
    write_config,
)

# The names of nodes are addresses, which resolve everywhere.
NODES = ("127.0.0.21", "127.0.0.22")
SETTINGS = """\
ClusterName=loopback
SlurmctldHost=HOST(127.0.0.1)
SlurmctldPort=PORT0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=FOLDER/munge.socket
StateSaveLocation=FOLDER/state
SlurmdSpoolDir=FOLDER/spool-%n
SlurmctldPidFile=FOLDER/slurmctld.pid
SlurmdPidFile=FOLDER/slurmd-%n.pid
SlurmctldLogFile=FOLDER/slurmctld.log
SlurmdLogFile=FOLDER/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=2
SlurmdTimeout=300
SlurmdParameters=config_overrides
"""


class Slurm:
    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"), SWIN_MOE_ROOT=str(ROOT))

    def start(self):
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (folder / "state").mkdir()
        ports = free_ports(3)
        host = socket.gethostname()
        text = SETTINGS.replace("FOLDER", str(folder)).replace("PORT0", str(ports[0]))
        text = text.replace("HOST(", f"{host}(")
        for name, port in zip(NODES, ports[1:], strict=True):
            text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2\n"
        nodes = ",".join(NODES)
        text += f"PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 GraceTime=200\n"
        text += f"PartitionName=high Nodes={nodes} PriorityTier=9 PreemptMode=off\n"
        (folder / "slurm.conf").write_text(text)
        self.run_daemon(
            "munged", "-F", "--force", "--num-threads=2", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        until(lambda: (folder / "munge.socket").exists(), "munged listens")
        self.run_daemon("slurmctld", "-D", "-i")
        for name in NODES:
            self.run_daemon("slurmd", "-D", "-N", name)
        until(lambda: self.say("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 4, "nodes")

    def run_daemon(self, *command):
        with (self.folder / f"{command[0]}.out").open("a") as output:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, stdout=output, stderr=output)
            )

    def say(self, *command):
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, cwd=self.folder
        )
        return done.stdout if done.returncode == 0 else ""

    def submit(self, *options):
        """Submit a job and return its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, options)],
            env=self.env, capture_output=True, text=True, check=False, cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job):
        return self.say("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def tell(self, job, log):
        """Return the ends of the logs of a job and the daemons, and the states of job and nodes."""
        paths = [log, *sorted(self.folder.glob("slurm*.log"))]
        logs = [f"--- {path.name}\n{tail(path)}" for path in paths if path.exists()]
        commands = (("scontrol", "show", "job", job), ("sinfo",), ("sinfo", "-R"))
        return "\n".join([*logs, *(self.say(*command) for command in commands)])

    def close(self):
        """End all jobs, then the daemons and their leftovers."""
        self.say("scancel", "--me")
        with contextlib.suppress(AssertionError):
            until(lambda: not self.say("squeue", "-h").strip(), "no jobs", 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.info["name"] == "slurmstepd" and self.owns(process):
                    process.kill()

    def owns(self, process):
        return process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]


def tail(path, lines=60):
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


@pytest.fixture(scope="module")
def slurm():
    need("munged", "slurmctld", "slurmd", "sbatch", "srun")
    # munge needs a folder that only root can write, and sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/run"))
    folder.chmod(0o755)
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_are_preempted_and_go_on_from_the_checkpoint(slurm, tmp_path):
    """Up to a minute: Slurm takes its time to end, queue and restart the job."""
    config, run = write_config(tmp_path), run_of(tmp_path)
    script = LAUNCH / "slurm.sbatch"
    low = slurm.submit(
        "--nodes=2",
        f"--output={tmp_path}/slurm-%j.log",
        script,
        "--processes",
        "1",
        config,
        f"train.output={run}",
        "train.max_steps=0",
    )
    log = tmp_path / f"slurm-{low}.log"

    def wait(done, what, patience=PATIENCE):
        until(done, what, patience, lambda: slurm.tell(low, log))

    wait(lambda: last_step(run) > 10 or slurm.state(low) not in ("", "PENDING", "RUNNING"), "steps")
    assert slurm.state(low) == "RUNNING", log.read_text()
    high = slurm.submit("--partition=high", "--nodes=2", "--wrap", "true")
    wait(lambda: slurm.state(high) == "COMPLETED", "the job of the higher partition")
    stopped_at = last_step(run)
    wait(lambda: slurm.state(low) == "PENDING", "the job has queued again")
    # Slurm waits for 2 min; within the second of the requeue it refuses its own credential.
    slurm.say("scontrol", "update", f"jobid={low}", "StartTime=now+5")
    assert "stopped by a signal" in log.read_text()
    wait(lambda: last_step(run) > stopped_at + 5, "the requeued job goes on")
    assert f"resumed from step-{stopped_at:08d}" in log.read_text()
    assert starts(run) == 2
    slurm.say("scancel", low)
    gone = ("CANCELLED", "FAILED", "COMPLETED", "")
    wait(lambda: slurm.state(low) in gone, "who is cancelled saves, and does not queue again", 120)


def test_an_array_has_a_run_for_each_line(slurm, tmp_path):
    config = write_config(tmp_path)
    experiments = tmp_path / "rates.txt"
    experiments.write_text("# rates\noptimizer.base_lr=1e-3\n\noptimizer.base_lr=2e-3\n")
    job = slurm.submit(
        "--array=1-2", f"--output={tmp_path}/%a.log", LAUNCH / "slurm.sbatch", "--processes", "1",
        "--experiments", experiments, config, "train.max_steps=2",
        "parallel.expert_parallel_size=1",
    )  # fmt: skip
    until(lambda: set(slurm.state(job).split()) == {"COMPLETED"}, "both tasks")
    runs = [slurm.folder / "runs/tiny" / task for task in "12"]
    assert [last_step(run) for run in runs] == [2, 2]
    assert [load_config(run / "config.yaml").optimizer.base_lr for run in runs] == [1e-3, 2e-3]
