"""The launchers with a hostfile: DeepSpeed's over a real sshd on loopback, and mpirun."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.cluster.tools import (
    LAUNCH,
    Job,
    free_ports,
    last_step,
    need,
    run_of,
    search_path,
    until,
    write_config,
)

HOSTS = ("127.0.0.31", "127.0.0.32")


@pytest.fixture(scope="module")
def shells():
    """An sshd that listens on loopback only, and an ``ssh`` that enters it with its own key.

    Returns:
        the folder to put before PATH.
    """
    need("sshd", "ssh", "ssh-keygen")
    folder = Path(tempfile.mkdtemp(prefix="sshd-", dir="/run"))  # only root can write above it
    daemon = None
    try:
        for key in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True
            )
        (port,) = free_ports(1)
        listen = "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
        (folder / "sshd_config").write_text(
            f"{listen}HostKey {folder}/host\nPidFile {folder}/pid\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/user.pub\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nMaxStartups 100\n"
        )
        (folder / "ssh_config").write_text(
            f"Port {port}\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
            f"StrictHostKeyChecking no\nUserKnownHostsFile {folder}/known\nLogLevel ERROR\n"
        )
        wrapper = folder / "bin/ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its rights
        daemon = subprocess.Popen([shutil.which("sshd", path="/usr/sbin"), "-D", "-e", "-f",
                                   folder / "sshd_config"], stderr=subprocess.DEVNULL)  # fmt: skip
        try_it = [wrapper, HOSTS[1], "true"]
        until(lambda: subprocess.run(try_it, capture_output=True).returncode == 0, "sshd", 30)
        yield wrapper.parent
    finally:
        if daemon is not None:
            daemon.terminate()
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def start(script, hosts, config, *options, **env):
    hostfile = config.parent / "hosts"
    hostfile.write_text("# loopback\n" + "".join(f"{host} slots=1\n" for host in hosts))
    words = [LAUNCH / script, "--hostfile", hostfile, "--master", f"{hosts[0]}:{free_ports(1)[0]}"]
    overrides = [f"train.output={run_of(config.parent)}", *options]
    return Job([*words, config, *overrides], config.parent / "output.txt", **env)


def test_deepspeed_trains_on_two_hosts_over_ssh(shells, tmp_path):
    need("pdsh")
    path = f"{shells}:{search_path()}"
    job = start("deepspeed.sh", HOSTS, write_config(tmp_path), PATH=path)
    try:
        assert job.wait() == 0, job.text
    finally:
        job.stop()
    assert last_step(run_of(tmp_path)) == 10
    assert "2 processes = 1 data" in job.text


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpi.sh"])
def test_a_host_that_lets_nobody_in_is_one_line(shells, tmp_path, script):
    need("pdsh", "mpirun")
    job = start(script, (HOSTS[0], "127.0.0.33"), write_config(tmp_path),
                PATH=f"{shells}:{search_path()}")  # fmt: skip
    assert job.wait() == 2
    assert job.text.startswith(f"{script}: error: no ssh without a password to 127.0.0.33 (")
    assert job.text.count("\n") == 1


def test_mpirun_trains_on_two_ranks(tmp_path):
    need("mpirun")
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    config = write_config(tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    master = f"localhost:{free_ports(1)[0]}"
    job = Job(
        [LAUNCH / "mpi.sh", "--hostfile", hosts, "--master", master, config,
         f"train.output={run_of(tmp_path)}"],
        tmp_path / "output.txt", **allow,
    )  # fmt: skip
    try:
        assert job.wait() == 0, job.text
    finally:
        job.stop()
    assert last_step(run_of(tmp_path)) == 10
    assert "2 processes = 1 data × 2 expert parallel" in job.text
