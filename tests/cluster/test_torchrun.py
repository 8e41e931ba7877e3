"""torchrun on two hosts, which are network namespaces with a cable between them."""

import itertools
import os
import signal
import socket
import subprocess
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
    """As a scheduler would, on one node alone."""
    jobs[0].process.send_signal(signal.SIGTERM)
    assert [job.wait() for job in jobs] == [75, 75], [job.text for job in jobs]


def test_training_survives_a_short_cut(hosts, tmp_path):
    jobs, run = train_without_end(hosts, tmp_path)
    hosts.link("down")
    cut_at = last_step(run)
    until(lambda: True, "")
    time.sleep(5)
    assert last_step(run) <= cut_at + 1
    hosts.link("up")
    until(lambda: last_step(run) > cut_at + 20, "training goes on")
    assert starts(run) == 1
    stop_and_save(jobs)
