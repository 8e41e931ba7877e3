"""The command line: ``swin-moe``, ``python -m swin_moe`` and ``torchrun -m swin_moe``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from . import __version__

DONE, FAILED, WRONG_USE = 0, 1, 2
PREEMPTED = 75  # the system's EX_TEMPFAIL: try again

_PATIENCE = 5.0  # seconds that the launcher may take to end the other processes of a node

# What gloo, NCCL and the store say when the other end is gone.
_LOST_PEER = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")

_EPILOG = """\
examples:
  swin-moe train configs/fashion_mnist/swin_moe_micro.yaml
  swin-moe train configs/fashion_mnist/swin_moe_micro.yaml schedule.epochs=2 zero.stage=1
  torchrun --nproc-per-node 2 -m swin_moe train CONFIG parallel.expert_parallel_size=2
  swin-moe evaluate runs/swin_moe_micro
  swin-moe evaluate runs/swin_moe_micro/checkpoints/best
  swin-moe inspect runs/swin_moe_micro --images 6
  swin-moe checkpoint list runs/swin_moe_micro
  swin-moe prepare-data /data/fall11_whole /data/in22k --val 0.01
  swin-moe data show configs/fashion_mnist/swin_moe_micro.yaml

exit codes: 0 done, 1 failed, 2 wrong use (a config, an argument or data that cannot be used),
75 stopped by SIGTERM or SIGUSR1 with its checkpoint written: start again to go on
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    train.add_argument("config", metavar="CONFIG", help="YAML file, e.g. from configs/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. zero.stage=2")
    train.add_argument(
        "--fresh",
        action="store_true",
        help="start anew; an existing run directory is moved aside, never overwritten",
    )
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a run or a checkpoint on one process, with a table of classes",
        description="Evaluate the last checkpoint of a run directory, or a checkpoint folder, on "
        "the config's held-out data. Any checkpoint works on one process, whatever trained it.",
    )
    evaluate.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.path=DIR")
    inspect = _add_inspect(commands)
    models = commands.add_parser("models", help="list the models, their parameters and GMACs")
    models.add_argument("pattern", nargs="?", default="*", help="e.g. 'swinv2_base*'")
    convert = _add_convert(commands)
    checkpoints = _add_checkpoint(commands)
    data = _add_data(commands)
    for command in (train, evaluate, inspect, models, convert, *checkpoints, *data):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


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
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.val=test")
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
        "output", metavar="OUT", help="safetensors unless it ends in .pth; or a folder"
    )
    convert.add_argument("overrides", nargs="*", metavar="key=value", help="model.img_size=384")
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
    show.add_argument("config", metavar="CONFIG")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. augment.mixup=0")
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
    return [prepare, show, verify]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse alone does not allow here."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    free = hasattr(arguments, "overrides")
    if unknown := [t for t in rest if t.startswith("-") or "=" not in t or not free]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parse(argv)
    _quiet()
    from .distributed import environment_rank, refuse_restart, shutdown

    try:
        rank, local_rank, size = environment_rank()
    except (ValueError, KeyError) as error:
        return _fail(f"the launcher's rank variables cannot be read ({error})", True, WRONG_USE)
    where = f"[rank {rank}] " if local_rank else ""
    try:
        code = _run(arguments)
        shutdown()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from where it was", local_rank == 0)
    except (ValueError, OSError) as error:
        # The same on every rank of a node: one of them tells.
        if arguments.debug:
            traceback.print_exc()
        if isinstance(error, ValueError):
            refuse_restart()
        return _fail(f"{where}{error}", local_rank == 0, WRONG_USE)
    except Exception as error:
        from .guard import Preempted
        from .trainer import TrainingError

        if isinstance(error, (Preempted, TrainingError)):
            refuse_restart()
        if isinstance(error, Preempted):
            return _fail(str(error), local_rank == 0, PREEMPTED, alone=False)
        if arguments.debug:
            traceback.print_exc()
        logging.getLogger("swin_moe").debug("failed", exc_info=True)
        if isinstance(error, TrainingError):  # raised on every rank, or on none
            return _fail(str(error), local_rank == 0, alone=False)
        where = f"[rank {rank}] " if size > 1 else ""
        first = (str(error).strip() or "no message").splitlines()[0]
        if size > 1 and any(sign in str(error) for sign in _LOST_PEER):
            return _fail(f"{where}another process ended, and this one with it", False)
        return _fail(f"{where}{type(error).__name__}: {first} (--debug shows the traceback)", True)


def _fail(message: str, tell: bool, code: int = FAILED, alone: bool = True) -> int:
    """Print one line; what all ranks meet alike, only the first of each node tells.

    Args:
        alone: whether this rank may be the only one to fail, and must tell in the end.
    """
    logging.getLogger("swin_moe").debug("error: %s", message)
    if not tell:
        from .guard import StopSignal

        if StopSignal.came:  # while training was being built: the launcher ends us as the others
            return code
        # The first exit ends all processes of the node. Who still lives then failed alone.
        time.sleep(_PATIENCE)
    if tell or alone:
        print(f"swin-moe: error: {message}", file=sys.stderr, flush=True)
    return code


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from . import distributed
    from .config import load_config

    console = Console(soft_wrap=False)
    if arguments.command == "models":
        from .catalog import models_table

        table = models_table(arguments.pattern)
        if not console.is_terminal:
            console.width = 120  # a pipe has none of its own
        console.print(table)
        return DONE
    if arguments.command == "convert":
        _convert(arguments, console)
        return DONE
    if arguments.command == "checkpoint":
        return _checkpoint(arguments, console)
    if arguments.command in ("prepare-data", "data"):
        return _data(arguments, console)
    if arguments.command == "train":
        config = load_config(arguments.config, arguments.overrides)
        if config.parallel.expert_parallel_size == "auto":
            shardable = config.moe.enabled and config.zero.stage < 3
            size = distributed.auto_expert_parallel_size(config.moe.num_experts)
            config.parallel.expert_parallel_size = size if shardable else 1
        world = distributed.init(
            config.parallel.expert_parallel_size,
            hierarchical=config.parallel.hierarchical_all_to_all,
        )
        from . import run  # imports DeepSpeed, which looks at the environment that init sets

        run.train(config, world, console, arguments.fresh)
    else:
        path = Path(arguments.path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such run directory or checkpoint folder")
        world = distributed.init()
        if arguments.command == "inspect":
            _inspect(arguments, path, world, console)
        else:
            from .opened import evaluate_checkpoint  # imports DeepSpeed, too

            evaluate_checkpoint(path, world, console, arguments.overrides)
    return DONE


def _checkpoint(arguments: argparse.Namespace, console: Any) -> int:
    from . import checkpoints

    path = Path(arguments.path)
    if arguments.action == "list":
        if not console.is_terminal:
            console.width = 160  # a pipe has none of its own
        console.print(checkpoints.list_table(path))
    elif arguments.action == "verify":
        return DONE if checkpoints.verify(path, console) else FAILED
    elif arguments.action == "reshard":
        checkpoints.reshard(path, Path(arguments.output), arguments.files, console)
    else:
        checkpoints.export(path, Path(arguments.output), console, arguments.overwrite)
    return DONE


def _data(arguments: argparse.Namespace, console: Any) -> int:
    from .data import commands

    if arguments.command == "prepare-data":
        commands.prepare_data(
            Path(arguments.input),
            Path(arguments.output),
            console,
            val_share=arguments.val,
            shard_megabytes=arguments.shard_size,
            resize=arguments.resize,
            classes=arguments.classes,
            seed=arguments.seed,
            workers=arguments.workers,
        )
    elif arguments.action == "verify":
        path = Path(arguments.path)
        well = commands.verify_data(path, console, arguments.output, arguments.workers)
        return DONE if well else FAILED
    else:
        from .config import load_config
        from .data.show import show

        show(load_config(arguments.config, arguments.overrides), arguments.output, console)
    return DONE


def _inspect(arguments: argparse.Namespace, path: Path, world: Any, console: Any) -> None:
    from .inspection import inspect_checkpoint

    overrides = list(arguments.overrides)
    if arguments.data:
        is_override = "=" in arguments.data and not Path(arguments.data).exists()
        overrides.insert(0, arguments.data if is_override else f"data.path={arguments.data}")
    inspect_checkpoint(
        path,
        world,
        console,
        overrides,
        images=arguments.images,
        output=arguments.output,
        layers=arguments.layer,
    )


def _convert(arguments: argparse.Namespace, console: Any) -> None:
    from .config import parse_overrides
    from .convert import Upcycle, convert

    convert(
        Path(arguments.input),
        Path(arguments.output),
        console,
        source_dialect=arguments.source,
        dialect=arguments.target,
        model_name=arguments.model,
        overrides=parse_overrides(arguments.overrides),
        allow_missing=arguments.allow_missing,
        upcycling=Upcycle.parse(arguments.upcycle) if arguments.upcycle else None,
        ranks=arguments.ranks,
        overwrite=arguments.overwrite,
    )


def _quiet() -> None:
    """Keep the console for the run: libraries' chatter goes to the logs, warnings stay."""
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger().addHandler(console)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def entry() -> None:
    """The program: run and leave."""
    code = main()
    from .distributed import leave

    leave(code)


if __name__ == "__main__":
    entry()
