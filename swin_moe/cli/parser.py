"""The arguments of the command line; the other files of this folder run the commands."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..common import ranks
from ..common.text import plain

_EPILOG = """\
examples:
  swin-moe recipes
  swin-moe train fashion_mnist/swin_moe_micro
  swin-moe train my_config.yaml schedule.epochs=2 zero.stage=1
  torchrun --nproc-per-node 2 -m swin_moe train CONFIG parallel.expert_parallel_size=2
  swin-moe evaluate runs/swin_moe_micro
  swin-moe evaluate runs/swin_moe_micro/checkpoints/best
  swin-moe inspect runs/swin_moe_micro --images 6
  swin-moe checkpoint list runs/swin_moe_micro
  swin-moe prepare-data /data/fall11_whole /data/in22k --val 0.01
  swin-moe data show fashion_mnist/swin_moe_micro
  swin-moe plan scale/swin_moe_13b --nodes 4 --gpus-per-node 8 --gpu h100

exit codes: 0 done, 1 failed, 2 wrong use (a config, an argument or data that cannot be used),
75 stopped by SIGTERM or SIGUSR1 with its checkpoint written: start again to go on
"""


_CONFIG = "YAML file, or a recipe's name (`swin-moe recipes` lists them)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and prevent a restart by a launcher: the same words would fail again."""
        ranks.refuse_restart()
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="swin-moe",
        description="Train Swin Transformer V2 and its Mixture-of-Experts variant.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swin-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a config; resumes its run directory if that holds a checkpoint",
        description="Train a model. Without a launcher it runs as one process; under torchrun or "
        "Slurm it uses every process. If the run directory (train.output) holds a checkpoint, "
        "training resumes from the last complete one.",
    )
    _take_config(train)
    train.add_argument(
        "--fresh",
        action="store_true",
        help="start from the beginning; an existing run directory is moved aside, not overwritten",
    )
    train.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the data or its classes differ from the checkpoint's",
    )
    doctor = _add_doctor(commands)
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a run or a checkpoint on one process, with a table of classes",
        description="Evaluate the last checkpoint of a run directory, or a checkpoint folder, on "
        "the config's held-out data. Any checkpoint works on one process, whatever trained it.",
    )
    evaluate.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    _take_overrides(evaluate, "data.path=DIR")
    inspect = _add_inspect(commands)
    models = commands.add_parser("models", help="list the models, their parameters and GMACs")
    models.add_argument("pattern", nargs="?", default="*", help="e.g. 'swinv2_base*'")
    recipes = _add_recipes(commands)
    convert = _add_convert(commands)
    checkpoints = _add_checkpoint(commands)
    data = _add_data(commands)
    launch = _add_launch(commands)
    plan = _add_plan(commands)
    alone = (train, doctor, evaluate, inspect, models, recipes, convert, launch, plan)
    for command in (*alone, *checkpoints, *data):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _take_config(command: argparse.ArgumentParser, example: str = "zero.stage=2") -> None:
    command.add_argument("config", metavar="CONFIG", help=_CONFIG)
    _take_overrides(command, example)


def _take_overrides(command: argparse.ArgumentParser, example: str) -> None:
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help=f"e.g. {example}"
    )


def _add_doctor(commands: Any) -> argparse.ArgumentParser:
    doctor = commands.add_parser(
        "doctor",
        help="check the machines of a run before it: versions, links, clocks, disks",
        description="Under the launcher that will train: compare all processes (versions, code, "
        "config, compiled ops), time collectives of the run's sizes, and see that all share the "
        "run directory. Exit code 0: a run may begin; 2: it would be refused. A training checks "
        "the same at each start.",
    )
    _take_config(doctor)
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    doctor.add_argument(
        "--clear-kernel-cache",
        action="store_true",
        help="forget which kernels passed on this machine, and try them again",
    )
    doctor.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="to wait for processes that do not come (default 60)",
    )
    return doctor


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    inspect = commands.add_parser(
        "inspect",
        help="draw which image patches each expert of a run or a checkpoint takes",
        description="Draw a few held-out images with their patches in the colours of the experts "
        "that take them, and for each expert the patches that it weighs most; print the load and "
        "the most frequent classes of each expert. Runs as one process.",
    )
    inspect.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    inspect.add_argument(
        "data", nargs="?", metavar="DATA", help="instead of the config's data.path"
    )
    _take_overrides(inspect, "data.val=test")
    inspect.add_argument("--images", type=int, default=8, metavar="N", help="to draw (default 8)")
    inspect.add_argument(
        "--output", type=Path, metavar="FILE.png", help="default: inspect.png in the run directory"
    )
    inspect.add_argument(
        "--layer",
        action="append",
        metavar="NAME",
        help="an MoE layer, e.g. layers.2.blocks.1, or several; default: the last ones that fit",
    )
    return inspect


def _add_plan(commands: Any) -> argparse.ArgumentParser:
    plan = commands.add_parser(
        "plan",
        help="tell what a run takes before it is started: memory, messages, time, what fits",
        description="Print parameters, FLOPs, memory by kind, bytes of each collective, time of an "
        "update and of the run on GPUs that need not be here, rank the layouts that fit at the "
        "config's global batch, and draw their memory. Exit code 2 if the config as it stands does "
        "not fit.",
    )
    _take_config(plan)
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="M", help="default 8")
    plan.add_argument(
        "--gpu", default="h100", help="h100, h200, b200, a100-40, a100-80, …, or cpu (default h100)"
    )
    plan.add_argument(
        "--images", type=int, metavar="N", help="of an epoch, where data.path is not here"
    )
    plan.add_argument(
        "--price", type=float, metavar="P", help="price of a GPU-hour: prints the run's cost"
    )
    plan.add_argument(
        "--simulate", action="store_true", help="weak and strong scaling up to 2,048 GPUs"
    )
    plan.add_argument("--output", type=Path, default=Path("plan.png"), metavar="FILE.png")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return plan


def _add_recipes(commands: Any) -> argparse.ArgumentParser:
    recipes = commands.add_parser(
        "recipes",
        help="list the configs that come with the package, or copy them",
        description="List the configs that come with the package. Every CONFIG of the other "
        "commands may be one of their names. --copy copies them with their base files, to edit.",
    )
    recipes.add_argument("pattern", nargs="?", default="*", help="e.g. 'imagenet22k/swinv2_*'")
    recipes.add_argument(
        "--copy", type=Path, metavar="FOLDER", help="copy there; files there are never overwritten"
    )
    return recipes


def _add_convert(commands: Any) -> argparse.ArgumentParser:
    convert = commands.add_parser(
        "convert",
        help="translate weights between ours, official, timm, Hugging Face, torchvision, mmseg",
        description="Read weights of any dialect (.pth, .safetensors, a folder of shards, a run or "
        "checkpoint of ours, official Swin-MoE .pth.rank* files), fit them to a model and write "
        "them in any dialect. Prints what became of each tensor; nothing in a file is executed.",
    )
    convert.add_argument("input", metavar="IN")
    convert.add_argument(
        "output",
        metavar="OUT",
        help="FILE.safetensors or FILE.pth; for timm and huggingface also a folder",
    )
    _take_overrides(convert, "model.img_size=384")
    known = ["swin_moe", "official", "timm", "huggingface", "torchvision", "mmseg"]
    convert.add_argument("--from", dest="source", choices=["auto", *known], default="auto")
    convert.add_argument("--to", dest="target", choices=known, default="swin_moe")
    convert.add_argument(
        "--model", default="", help="fit to this model (see `swin-moe models`); default: the file's"
    )
    convert.add_argument(
        "--upcycle",
        nargs="+",
        metavar="key=value",
        help="make a mixture of experts of a dense model: experts=8 [top_k=1] [noise=0.01] "
        "[gate=zero|random]; put other overrides before it",
    )
    convert.add_argument(
        "--take", default="", metavar="PREFIX", help="which of a file's networks, e.g. model_ema"
    )
    convert.add_argument("--allow-missing", action="store_true", help="go on if tensors do not fit")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    convert.add_argument(
        "--ranks", type=int, default=1, help="files of an official Swin-MoE .pth (default 1)"
    )
    return convert


def _add_checkpoint(commands: Any) -> list[argparse.ArgumentParser]:
    checkpoint = commands.add_parser(
        "checkpoint",
        help="list, verify, reshard or export the checkpoints of a run",
        description="Any number of processes reads any checkpoint: nothing has to be resharded for "
        "a resume.",
    )
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="what there is, how large, written by whom")
    verify = actions.add_parser("verify", help="read every byte and hold it against the manifest")
    reshard = actions.add_parser("reshard", help="write a checkpoint in another number of files")
    export = actions.add_parser("export", help="the weights alone as one safetensors file")
    for action in (listing, verify, reshard, export):
        action.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    reshard.add_argument("output", metavar="OUT", help="folder to make")
    reshard.add_argument("--files", type=int, default=1, metavar="N", help="default 1")
    export.add_argument("output", metavar="OUT.safetensors")
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return [listing, verify, reshard, export]


def _add_data(commands: Any) -> list[argparse.ArgumentParser]:
    prepare = commands.add_parser(
        "prepare-data",
        help="write any data set as shuffled tar shards with an index",
        description="Read a folder of class folders, a folder of tars (webdataset or one per "
        "class), a .zip with its _map.txt, a list of files, parquet shards, or a root with train "
        "and val of these, and write tar shards. Interrupted or killed, the same command goes on.",
    )
    prepare.add_argument("input", metavar="IN")
    prepare.add_argument("output", metavar="OUT", help="folder to make")
    prepare.add_argument(
        "--val", type=float, default=0.0, metavar="SHARE", help="of each class, held out as val"
    )
    prepare.add_argument(
        "--shard-size", type=int, default=512, metavar="MB", help="of a shard (default 512)"
    )
    prepare.add_argument(
        "--resize", type=int, default=0, metavar="PIXELS", help="shorter side of larger images"
    )
    prepare.add_argument(
        "--classes", type=Path, metavar="FILE", help="keep these, a line each: label = line"
    )
    prepare.add_argument("--seed", type=int, default=0, help="of the order (default 0)")
    data = commands.add_parser("data", help="show what a config trains on, verify a data set")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="draw augmented and mixed batches with their labels")
    _take_config(show, "augment.mixup=0")
    show.add_argument("--output", type=Path, default=Path("data.png"), metavar="FILE.png")
    verify = actions.add_parser("verify", help="read and decode every sample, list the bad ones")
    verify.add_argument("path", metavar="PATH")
    verify.add_argument(
        "--output", type=Path, default=Path("bad-samples.jsonl"), metavar="FILE", help="the list"
    )
    for command in (prepare, verify):
        command.add_argument(
            "--workers", type=int, default=0, metavar="N", help="processes (default: all cores)"
        )
        command.add_argument(
            "--max-pixels", type=int, default=178_956_970, metavar="N",
            help="largest image to read, as data.max_pixels in a config",
        )  # fmt: skip
    return [prepare, show, verify]


def _add_launch(commands: Any) -> argparse.ArgumentParser:
    launch = commands.add_parser(
        "launch",
        help="train on many processes: this machine, torchrun, Slurm, hostfile, Kubernetes",
        description="Check what can be checked before anything starts, then run the launcher of "
        "launch/ for the engine, or hand Kubernetes a manifest. See docs/launching.md.",
    )
    _take_config(launch)
    engines = ["local", "torchrun", "slurm", "deepspeed", "mpi", "kubernetes"]
    launch.add_argument("--on", required=True, choices=engines, dest="engine")
    launch.add_argument("--nodes", default="", metavar="N", help="torchrun: or MIN:MAX")
    launch.add_argument("--gpus-per-node", type=int, metavar="M", help="processes of a node")
    launch.add_argument("--cpu", action="store_true", help="M processes a node, on its CPU")
    launch.add_argument("--master", default="", metavar="HOST[:PORT]", help="one of the nodes")
    launch.add_argument(
        "--hostfile", default="", metavar="FILE", help="deepspeed, mpi: lines 'HOST slots=GPUS'"
    )
    launch.add_argument("--max-restarts", type=int, metavar="N", help="after failures (default 3)")
    launch.add_argument(
        "--timeout", type=int, metavar="SECONDS", help="for all nodes to come (default 300)"
    )
    launch.add_argument(
        "--experiments", default="", metavar="FILE", help="slurm: an array, overrides per line"
    )
    launch.add_argument(
        "--manifest", default="", metavar="FILE", help="kubernetes: instead of kubernetes.yaml"
    )
    launch.add_argument("--fresh", action="store_true", help="start from the beginning, see train")
    launch.add_argument(
        "--accept-changes", action="store_true", help="resume with changed data, see train"
    )
    launch.add_argument(
        "--doctor", action="store_true", help="check the machines on this road; do not train"
    )
    launch.add_argument("--dry-run", action="store_true", help="print what would run")
    return launch


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse alone does not allow here."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    free = hasattr(arguments, "overrides")
    if unknown := [t for t in rest if t.startswith("-") or "=" not in t or not free]:
        dashed = re.fullmatch(r"--?(\w+\.\w+)(=.*)?", unknown[0], re.DOTALL) if free else None
        hint = f"; an override has no dashes: {dashed[1]}{dashed[2] or '=...'}" if dashed else ""
        parser.error(plain(f"unrecognized arguments: {' '.join(unknown)}{hint}"))
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments
