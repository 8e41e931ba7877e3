"""``swin-moe launch``: checks the request before anything starts, then runs a script.

The scripts of ``launch/`` are the launchers; this only finds mistakes early and fills in options.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.host import count_gpus
from ..common.ranks import check_world
from ..common.reading import read_text
from ..common.shipped import launch_scripts
from ..common.text import plain
from ..config import Config, dump_plain, load_config, load_plain, micro_batches
from ..data.readers.shards import has_wildcard
from ..data.source import BUNDLED
from .nodes import PORT, check_port

FOLDER = launch_scripts()
RENDEZVOUS = "PET_RDZV_ID"  # torchrun's --rdzv-id
ON_A_CPU = 2  # processes of launch/local.sh where there is no GPU
_LARGEST = 1 << 20  # bytes of a file of hosts or experiments
POD_TIMEOUT = 900  # seconds for all pods to be scheduled and to have their image

# The options of each engine, in addition to CONFIG and its overrides.
ENGINES = {
    "local": {"gpus_per_node", "cpu", "max_restarts"},
    "torchrun": {"nodes", "gpus_per_node", "cpu", "master", "max_restarts", "timeout"},
    "slurm": {"nodes", "gpus_per_node", "cpu", "max_restarts", "timeout", "experiments"},
    "deepspeed": {"nodes", "gpus_per_node", "master", "hostfile"},
    "mpi": {"nodes", "gpus_per_node", "master", "hostfile"},
    "kubernetes": {"nodes", "gpus_per_node", "cpu", "max_restarts", "timeout", "manifest"},
}
_BOUNDS = (("gpus_per_node", 1, 9_999), ("max_restarts", 0, 999_999), ("timeout", 1, 999_999))
ON_THIS_MACHINE = ("local", "torchrun")  # engines whose processes run where they are called


@dataclass(frozen=True)
class Request:
    """The request of the user; None and empty where an option was not given.

    Attributes:
        nodes: a number, or MIN:MAX with torchrun. gpus_per_node: processes of a node.
        cpu: the processes run on CPUs, and no GPUs are asked for.
        experiments: file with the overrides of an array task per line.
        manifest: the TrainJob to fill in. doctor: check the machines instead of training.
    """

    engine: str
    config: str
    overrides: list[str] = field(default_factory=list)
    nodes: str = ""
    gpus_per_node: int | None = None
    cpu: bool = False
    master: str = ""
    hostfile: str = ""
    max_restarts: int | None = None
    timeout: int | None = None
    experiments: str = ""
    manifest: str = ""
    fresh: bool = False
    accept_changes: bool = False
    doctor: bool = False

    @property
    def words(self) -> list[str]:
        """CONFIG and the words after it."""
        return [
            self.config,
            *self.overrides,
            *(["--fresh"] if self.fresh and not self.doctor else []),
            *(["--accept-changes"] if self.accept_changes and not self.doctor else []),
        ]

    def given(self) -> dict[str, Any]:
        """The given options of engines."""
        every = set().union(*ENGINES.values())
        values = {name: getattr(self, name) for name in sorted(every)}
        return {name: value for name, value in values.items() if value not in ("", None, False)}


def launch(request: Request, dry_run: bool = False) -> int:
    """Replace this process by the engine's launcher, or print what would run.

    Returns:
        the exit code of kubectl; the other engines' launchers take this process's place.

    Raises:
        ValueError: one line about the first mistake; nothing was started.
    """
    config = check(request)
    if request.engine == "kubernetes":
        text = dump_plain(train_job(request))
        if dry_run:
            print(text, end="")
            return 0
        _need_program("kubectl", "Kubernetes")
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode
    if not _data_is_here(config):
        print(
            f"swin-moe: warning: data.path={plain(config.data.path)} is not on this machine; every "
            "node must have it",
            file=sys.stderr,
        )
    words = command(request, dry_run)
    if request.engine == "slurm":
        if dry_run:
            print(shlex.join(words))
            return 0
        _need_program("sbatch", "Slurm")
    sys.stdout.flush()
    os.execvp(words[0], words)


def _need_program(name: str, engine: str) -> None:
    if shutil.which(name) is None:
        raise ValueError(f"{name} is not installed here: call this where {engine} can be reached")


def command(request: Request, dry_run: bool = False) -> list[str]:
    """Return the script of ``launch/`` with its options, for every engine but Kubernetes.

    Args:
        dry_run: the script is to print what it would run; Slurm's would be run by sbatch.
    """
    given = request.given()
    options = []
    for name in ("nodes", "master", "hostfile", "max_restarts", "timeout", "experiments"):
        if name in given and (name != "nodes" or request.engine == "torchrun"):
            options += [f"--{name.replace('_', '-')}", str(given[name])]
    if request.gpus_per_node and (request.engine in ("local", "torchrun") or request.cpu):
        options += ["--processes", str(request.gpus_per_node)]
    if request.doctor:
        options.append("--doctor")
    python = f"SWIN_MOE_PYTHON={sys.executable}"
    if request.engine != "slurm":
        if dry_run:
            options.append("--dry-run")
        hidden = ["CUDA_VISIBLE_DEVICES="] if request.cpu else []
        return [
            "env",
            python,
            *hidden,
            str(FOLDER / f"{request.engine}.sh"),
            *options,
            *request.words,
        ]
    root = f"SWIN_MOE_ROOT={FOLDER.parent}"
    batch = ["env", python, root, "sbatch", "--nodes", request.nodes or "1"]
    if not request.cpu:
        batch += ["--gpus-per-node", str(request.gpus_per_node)]
    if request.experiments:
        batch += ["--array", f"1-{len(read_experiments(Path(request.experiments)))}"]
    return [*batch, str(FOLDER / "slurm.sbatch"), *options, *request.words]


def check(request: Request) -> Config:
    """Return the config; raise ``ValueError`` for faults that are visible on this machine."""
    if not FOLDER.is_dir():
        raise ValueError(f"{FOLDER}: the launch scripts are missing; install the package again")
    for name in request.given():
        if name not in ENGINES[request.engine]:
            engines = ", ".join(engine for engine, names in ENGINES.items() if name in names)
            raise ValueError(
                f"--{name.replace('_', '-')} is not for --on {request.engine}, but for {engines}"
            )
    for name, least, most in _BOUNDS:
        value = getattr(request, name)
        if value is not None and not least <= value <= most:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: expected a number from {least} to {most}"
            )
    config = load_config(request.config, request.overrides)
    if request.experiments:
        _check_experiments(request)
    size = config.parallel.expert_parallel_size
    for processes in _worlds(request):
        if size != "auto":
            check_world(processes, size)
        if config.data.global_batch:
            micro_batches(config, processes)
    if request.engine in ON_THIS_MACHINE:
        _check_this_machine(request, config)
    return config


def _check_experiments(request: Request) -> None:
    """Check the config of each experiment, and that no two share a run directory."""
    lines: dict[str, int] = {}
    for task, (number, words) in enumerate(read_experiments(Path(request.experiments)), start=1):
        place = f"{request.experiments}:{number}"
        try:
            own = (
                f"train.output=runs/{Path(request.config).stem}/{task}"  # as slurm.sbatch gives it
            )
            output = load_config(request.config, [own, *request.overrides, *words]).train.output
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        first = lines.setdefault(os.path.abspath(output), number)
        if first != number:
            raise ValueError(
                f"{place}: train.output={plain(output)} is also that of line {first}: leave it "
                "out, or give each line its own"
            )


def _check_this_machine(request: Request, config: Config) -> None:
    """Check that this machine has the GPUs and the data."""
    asked, gpus = request.gpus_per_node, count_gpus()
    if not request.cpu and asked and asked > gpus:
        here = f"{gpus} (CUDA_VISIBLE_DEVICES counts)" if gpus else "no GPU"
        raise ValueError(
            f"--gpus-per-node {asked}: this machine has {here}; add --cpu for {asked} processes on "
            "its CPU"
        )
    if request.engine == "torchrun" and not asked and (request.cpu or not gpus):
        raise ValueError(
            "--gpus-per-node M is missing (with --cpu: processes of a node); this machine has "
            f"{gpus or 'no'} GPUs"
        )
    if not _data_is_here(config):
        raise ValueError(
            f"data.path={plain(config.data.path)}: no such file or folder on this machine"
        )


def _data_is_here(config: Config) -> bool:
    path = Path(config.data.path).expanduser()
    return path.exists() or config.data.path in BUNDLED or has_wildcard(config.data.path)


def _worlds(request: Request) -> list[int]:
    """Return the possible numbers of processes, as far as this machine knows."""
    if request.engine in ("deepspeed", "mpi"):
        return [_check_hostfile(request)]
    match = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", request.nodes or "1")
    elastic = request.engine == "torchrun"
    if match is None or (match[2] and not elastic):
        raise ValueError(
            f"--nodes {request.nodes}: expected a number from 1 on"
            + (" or MIN:MAX" if elastic else "")
        )
    least, most = int(match[1]), int(match[2] or match[1])
    if least > most:
        raise ValueError(f"--nodes {request.nodes}: MIN is more than MAX")
    if request.engine == "torchrun":
        if not request.nodes:
            raise ValueError("--nodes N is missing: how many machines run this command")
        _check_master(request.master)
    if request.gpus_per_node is None and request.engine in ("slurm", "kubernetes"):
        raise ValueError("--gpus-per-node M is missing (with --cpu: processes of a node)")
    processes = request.gpus_per_node or (0 if request.cpu else count_gpus())
    if not processes and request.engine == "local":
        processes = ON_A_CPU
    if not processes:
        return []  # refused later
    return [nodes * processes for nodes in range(least, most + 1)]


def _check_master(master: str) -> None:
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?::(\d{1,5}))?", master)
    if match is None or not 0 < int(match[2] or PORT) < 2**16:
        raise ValueError(f"--master {master!r}: expected HOST or HOST:PORT of one of the nodes")
    check_port(match[1], int(match[2] or PORT))


def read_hostfile(path: Path) -> dict[str, int]:
    """Return slots by host. Names reach shells on other machines, so only plain lines pass."""
    hosts: dict[str, int] = {}
    for number, line in _lines(path, "--hostfile"):
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=([1-9]\d{0,3})\s*", line)
        if match is None:
            raise ValueError(f"{path}:{number}: expected 'HOST slots=GPUS', got {line!r}")
        if match[1] in hosts:
            raise ValueError(f"{path}:{number}: host {match[1]} stands twice in this file")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"{path}: no line 'HOST slots=GPUS' in this file")
    return hosts


def _check_hostfile(request: Request) -> int:
    if not request.hostfile:
        raise ValueError("--hostfile FILE is missing; its lines read 'HOST slots=GPUS'")
    hosts = read_hostfile(Path(request.hostfile))
    if request.nodes and request.nodes != str(len(hosts)):
        raise ValueError(f"--nodes {request.nodes}: {request.hostfile} lists {len(hosts)} hosts")
    for host, slots in hosts.items():
        if request.gpus_per_node not in (None, slots):
            raise ValueError(
                f"--gpus-per-node {request.gpus_per_node}: {request.hostfile} gives {slots} slots "
                f"to {host}"
            )
    _check_master(request.master or next(iter(hosts)))
    return sum(hosts.values())


def read_experiments(path: Path) -> list[tuple[int, list[str]]]:
    """Return line number and overrides of each experiment, as ``slurm.sbatch`` reads them."""
    found = [(n, re.findall(r"[^ \t]+", line)) for n, line in _lines(path, "--experiments")]
    if not found:
        raise ValueError(f"{path}: no experiments in this file: a line of key=value each")
    return found


def _lines(path: Path, option: str) -> list[tuple[int, str]]:
    """Return lines with their numbers, without comments and blank lines."""
    try:
        text = read_text(path, _LARGEST)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from None
    except ValueError as error:  # it names the file
        raise ValueError(f"{option}: {error}") from None
    numbered = ((n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), start=1))
    return [(n, line) for n, line in numbered if not re.fullmatch(r"\s*(#.*)?", line)]


def train_job(request: Request) -> dict[str, Any]:
    """Fill in the TrainJob of ``launch/kubernetes.yaml`` or of the user."""
    path = Path(request.manifest or FOLDER / "kubernetes.yaml")
    job = load_plain(path)
    nodes, processes = int(request.nodes or 1), int(request.gpus_per_node or 1)
    try:
        trainer, metadata = job["spec"]["trainer"], job["metadata"]
        trainer |= {"numNodes": nodes, "numProcPerNode": processes}
    except (KeyError, TypeError):
        raise ValueError(f"{path}: expected a TrainJob with metadata and spec.trainer") from None
    stem = re.sub(r"[^a-z0-9]+", "-", Path(request.config).stem.lower()).strip("-")
    metadata["name"] = stem[:40].strip("-") or "swin-moe"
    if request.cpu:
        trainer.get("resourcesPerNode", {}).get("limits", {}).pop("nvidia.com/gpu", None)
    else:
        resources = trainer.setdefault("resourcesPerNode", {}).setdefault("limits", {})
        resources["nvidia.com/gpu"] = str(processes)
    # All pods get the same secret. Nobody can guess it and join the job.
    environment = trainer.setdefault("env", [])
    if not any(variable.get("name") == RENDEZVOUS for variable in environment):
        environment.append({"name": RENDEZVOUS, "value": secrets.token_hex(16)})
    restarts = 3 if request.max_restarts is None else request.max_restarts
    trainer["command"] = [
        "python", "-m", "swin_moe.launch.torchrun",
        "--nnodes", str(nodes), "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)",
        "--rdzv-conf", f"join_timeout={request.timeout or POD_TIMEOUT}",
        "--max-restarts", str(restarts),
        "-m", "swin_moe", "doctor" if request.doctor else "train",
    ]  # fmt: skip
    # Kubernetes would replace $(NAME) by a variable.
    trainer["args"] = [word.replace("$(", "$$(") for word in request.words]
    return job
