"""Checks of the Dockerfile that need no docker."""

import re
import shlex
import subprocess

import pytest

from swin_moe.config import load_plain
from tests.parallel import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
JOINED = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE))
STEPS = [line.split(maxsplit=1) for line in JOINED.splitlines() if line.strip()]
PROJECT = "/opt/swin_moe"


def steps(kind):
    return [words for name, words in STEPS if name == kind]


def commands():
    """The single commands of all RUN steps, as words."""
    return [shlex.split(part) for run in steps("RUN") for part in run.split("&&")]


def variables():
    """What ENV sets, by name."""
    return dict(word.split("=", 1) for line in steps("ENV") for word in shlex.split(line))


def test_every_source_is_in_a_clone():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
                             capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    sources = [copy.split()[:-1] for copy in steps("COPY") if not copy.startswith("--from")]
    assert sources[:2] == [["Makefile", "pyproject.toml"], ["requirements"]]
    for source in [word for words in sources for word in words]:
        assert source == "." or any(f"{file}/".startswith(f"{source}/") for file in tracked)
    assert [copy for copy in steps("COPY") if copy.startswith("--from")] == [
        f"--from=build {PROJECT} {PROJECT}"
    ]


def test_stages_and_their_arguments_are_there():
    stages = [line.split() for line in steps("FROM")]
    names = {stage[2] for stage in stages if stage[1:2] == ["AS"]}
    assert names == {"tools-cpu", "tools-cuda", "build"}
    assert "DEVICE=cpu" in steps("ARG")
    defaults = dict(line.split("=", 1) for line in steps("ARG"))
    for stage in stages:
        filled = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], stage[0])
        assert filled in names or re.fullmatch(r"[a-z/]+:[\w.-]+", filled)
    # The same Ubuntu, so that the virtual environment finds its Python again.
    assert defaults["UBUNTU_IMAGE"].split(":")[1] in defaults["CUDA_IMAGE"]


def test_the_toolkit_is_of_the_pinned_cuda():
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    pinned = re.search(
        r"^cuda-toolkit==([\d.]+) ; python_full_version >= '3.11'", lock, re.MULTILINE
    )
    assert pinned is not None
    version = dict(line.split("=", 1) for line in steps("ARG"))["CUDA_IMAGE"].split(":")[1]
    assert version.split(".")[:2] == pinned[1].split(".")[:2]


def test_it_is_built_by_the_makefile_with_what_that_needs():
    targets = [words[1:] for words in commands() if words[0] == "make"]
    assert targets == [["packages"], ["setup"]]
    for target in ("packages", "setup"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    install = next(words for words in commands() if "install" in words)
    assert {"g++", "make", "python3", "python3-venv"} <= set(install)
    # At run time DeepSpeed compiles its collective for CPUs.
    assert "g++" in [words for words in commands() if "install" in words][1]


def test_any_user_but_root_runs_the_program():
    (user,) = steps("USER")
    assert re.fullmatch(
        r"[1-9]\d*(:\d+)?", user
    )  # a number: Kubernetes can see that it is not root
    assert STEPS.index(["USER", user]) > max(
        i for i, (name, _) in enumerate(STEPS) if name == "RUN"
    )
    found = variables()
    assert found["PATH"].split(":")[0] == f"{PROJECT}/.venv/bin"
    opened = [words[-1] for words in commands() if "1777" in words]
    assert opened == [found["HOME"], "runs", "."]  # what an unknown user may write in
    assert found["USER"]  # for those who ask for a name
    (command,) = steps("CMD")
    assert command == '["swin-moe", "--help"]'


def test_nothing_that_was_made_in_the_clone_gets_in():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    made = (ROOT / ".gitignore").read_text().splitlines()
    for pattern in [*made, ".git"]:
        name = pattern.rstrip("/")
        assert name in ignored or f"**/{name}" in ignored, pattern


def test_kubernetes_gives_the_workers_shared_memory():
    job = load_plain(ROOT / "launch" / "kubernetes.yaml")
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]["template"]["spec"]
    (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    (volume,) = [v for v in spec["volumes"] if v["name"] == mount["name"]]
    assert volume["emptyDir"] == {"medium": "Memory"}


@pytest.mark.parametrize("name", ["Dockerfile", "docs/docker.md"])
def test_the_docs_say_what_the_file_does(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "docker build -t swin_moe" in text
    assert "--build-arg DEVICE=cuda" in text
