"""torchrun on two hosts, which are network namespaces with a cable between them."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cluster.tools import (
    LAUNCH,
    Job,
    last_step,
    need,
    run_of,
    starts,
    until,
    worlds,
    write_config,
)

A, B = "10.213.7.1", "10.213.7.2"


class Hosts:
    """Two hosts and their cable."""

    def __init__(self, folder):
        self.folder = folder
        self.names = [f"swin-moe-{os.getpid()}-{end}" for end in "ab"]
        self.jobs, self.numbers = [], itertools.count()

    def ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def connect(self):
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        ends = [f"sm{os.getpid()}{end}" for end in "ab"]
        self.ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, (A, B), strict=True):
            self.ip("link", "set", end, "netns", name, "name", "cable")
            self.ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            self.ip("-n", name, "link", "set", "cable", "up")

    def link(self, state):
        self.ip("-n", self.names[1], "link", "set", "cable", state)

    def start(self, host, *options, script="torchrun.sh"):
        output = self.folder / f"output-{next(self.numbers)}.txt"
        words = ["ip", "netns", "exec", self.names[host], LAUNCH / script]
        self.jobs.append(Job([*words, *options], output))
        return self.jobs[-1]

    def listen(self, host, port):
        """Start another program that listens at a port."""
        code = (
            "import socket, time\n"
            f"s = socket.create_server(('', {port}))\nprint(flush=True)\ntime.sleep(600)"
        )
        words = ["ip", "netns", "exec", self.names[host], sys.executable, "-c", code]
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        process.stdout.readline()  # it listens
        return process

    def close(self):
        for job in self.jobs:
            job.stop()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def hosts(tmp_path):
    need("ip")
    hosts = Hosts(tmp_path)
    try:
        try:
            hosts.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine gives no network namespaces: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.close()


def options(config, *overrides, nodes="2", master=A, timeout="120"):
    place = ["--nodes", nodes, "--master", master, "--processes", "1", "--timeout", timeout]
    return [*place, config, f"train.output={run_of(config.parent)}", *overrides]


def train_without_end(hosts, tmp_path, *overrides):
    words = options(write_config(tmp_path), "train.max_steps=0", *overrides)
    jobs = [hosts.start(host, *words) for host in (0, 1)]
    run = run_of(tmp_path)
    until(lambda: last_step(run) > 20 or not all(job.alive() for job in jobs), "20 steps")
    assert all(job.alive() for job in jobs), [job.text for job in jobs]
    return jobs, run


def stop_and_save(jobs):
    """Send a signal on one node only, as a scheduler may."""
    jobs[0].process.send_signal(signal.SIGTERM)
    assert [job.wait() for job in jobs] == [75, 75], [job.text for job in jobs]


def test_a_short_cut_only_delays_and_a_long_one_restarts(hosts, tmp_path):
    """One training for both. Most of the time is two waits: a cut link, and the hang after it."""
    jobs, run = train_without_end(hosts, tmp_path, "faults.hang_timeout_s=15")
    hosts.link("down")
    stood_at = until_it_stands(run)
    hosts.link("up")
    until(lambda: last_step(run) > stood_at + 20, "training goes on")
    assert starts(run) == 1
    hosts.link("down")
    hung = "nothing went on for 15 s"
    until(lambda: all(hung in job.text for job in jobs), "both find that they hang")
    hosts.link("up")
    until(lambda: starts(run) == 2, "both meet again")
    resumed_at = last_step(run)
    until(lambda: last_step(run) > resumed_at + 20, "training goes on from the checkpoint")
    text = jobs[0].text + jobs[1].text
    assert "started again by the launcher after a failure (1 of 3)" in text
    assert "resumed from step-" in text
    stop_and_save(jobs)


def test_a_run_grows_by_a_node_and_goes_on_without_one_that_dies(hosts, tmp_path):
    """Over a minute: a hang must be found, and torch must end a process that hangs."""
    changes = ["train.max_steps=0", "parallel.expert_parallel_size=1", "faults.hang_timeout_s=30"]
    words = options(write_config(tmp_path), *changes, nodes="1:2")
    run = run_of(tmp_path)
    first = hosts.start(0, *words)

    def goes_on(*sizes):
        until(lambda: worlds(run) == [*sizes] or not first.alive(), f"worlds of {sizes}")
        assert first.alive(), first.text
        began = last_step(run)
        until(lambda: last_step(run) > began + 12 or not first.alive(), "steps")
        assert first.alive(), first.text

    goes_on(1)
    second = hosts.start(1, *words)
    goes_on(1, 2)
    second.stop()
    goes_on(1, 2, 1)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.text


def until_it_stands(run):
    """Return the step after which nothing is logged for some seconds: the other host is gone."""
    last, since = last_step(run), time.monotonic()
    while time.monotonic() < since + 5.0:
        time.sleep(0.2)
        if last_step(run) > last:
            last, since = last_step(run), time.monotonic()
    return last


def one_line(job, code, *parts):
    assert job.wait() == code, job.text
    assert len(job.errors) == 1, job.text
    assert "Traceback" not in job.text
    for part in parts:
        assert part in job.errors[0]


def test_nodes_that_do_not_meet_are_one_line(hosts, tmp_path):
    """Four mistakes at once. Up to 40 seconds, the time-out of the longest."""
    config = write_config(tmp_path)
    listener = hosts.listen(0, 29507)
    try:
        nobody = hosts.start(1, *options(config, master=f"{A}:29501", timeout="3"))
        alone = hosts.start(0, *options(config, master=f"{A}:29502", timeout="30"))
        port = hosts.start(0, *options(config, master=f"{A}:29507"))
        name = hosts.start(1, *options(config, master="no-such-host.invalid", timeout="3"))
        one_line(nobody, 1, f"{A}:29501 cannot be reached within 3 s", "Connection refused")
        one_line(port, 2, "port 29507 of this machine, the master, is taken by python")
        one_line(name, 2, "--master no-such-host.invalid: this machine does not know that name")
        until(lambda: "1 of 2 nodes are here" in alone.text or not alone.alive(), "the first node")
        more = hosts.start(1, *options(config, master=f"{A}:29502", nodes="3", timeout="15"))
        one_line(more, 2, "give every node the same")
        one_line(alone, 1, "1 of 2 nodes came")
    finally:
        listener.kill()
        listener.wait()
